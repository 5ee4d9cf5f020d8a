"""Write docs/methods.md and docs/recipes.md from what is registered, and check that every relative link in the documentation leads somewhere.

What methods.md says of when to use which method comes from choosing.txt, its figures from the cells of docs/evidence (choosing.py): a claim that the
cells no longer bear out is an error.

python tools/check_docs.py            write both files
python tools/check_docs.py --check    write nothing; exit code 1 when one is out of date
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKSPACE = "qcore qcore-kernels qzoo qplug-"  # what other distributions happen to bring is not documented here
TITLES = {
    "solver": ("Solvers", "choose the codes of one weight"),
    "block_solver": ("Block solvers", "improve the codes of a block's weights together, once each was solved on its own"),
    "transform": ("Transforms", "keep the function and ease the numbers"),
    "format": ("Number formats", "what a code can stand for"),
    "observer": ("Observers", "what is kept of the tensors seen in calibration"),
    "allocator": ("Allocators", "give each layer its format within a budget"),
    "selector": ("Selectors", "choose samples"),
    "calibration": ("Calibration data", "where it comes from"),
    "packing": ("Packings", "how codes lie in memory and on disk"),
    "kernel": ("Kernels", "run an op straight from packed parts"),
    "adapter": ("Adapters", "what qcore knows of a model family"),
    "source": ("Model sources", "how an address becomes a model"),
    "task": ("Tasks", "what is measured, on which data"),
    "exporter": ("Exporters", "write a quantized model for another program"),
    "lowering": ("Lowerings", "turn a quantized model into another program"),
}


def ours(origin: str) -> bool:
    return any(origin == name or (name.endswith("-") and origin.startswith(name)) for name in WORKSPACE.split())


def methods_page(registry: Any, choosing: str) -> str:
    from qcore.cli.methods import described

    rows = [r for r in described(registry) if ours(r["from"])]
    parts = [
        "<!-- written by tools/check_docs.py; do not edit -->",
        "# Methods",
        "",
        "Everything that a recipe may name, and what is chosen by itself; `qcore methods` lists what is installed with you.",
        "",
        choosing.rstrip(),
    ]
    for kind, (title, what) in TITLES.items():
        own = [r for r in rows if r["kind"] == kind]
        if own:
            parts += [
                "",
                f"## {title}",
                "",
                f"They {what}."
                if what.split()[0] in ("choose", "improve", "keep", "give", "run", "write", "turn")
                else f"{what[0].upper()}{what[1:]}.",
                "",
                "| name | what it does | options | from |",
                "|---|---|---|---|",
            ]
            parts += [f"| `{r['name']}` | {_cell(r['what'])} | {_cell(', '.join(f'`{o}`' for o in r['options']))} | {r['from']} |" for r in own]
    return "\n".join(parts) + "\n"


def recipes_page(registry: Any) -> str:
    from qcore.recipe_file import load_recipe

    parts = [
        "<!-- written by tools/check_docs.py; do not edit -->",
        "# Recipes",
        "",
        "`qcore quantize MODEL --recipe NAME -o out/`. How to write one: [add/recipe.md](add/recipe.md).",
        "",
        "Names say what is stored: `w<b>a16-<method>` for weights alone, `<method>-w<b>a<b>` with activations, `kv<b>` with a key-value cache.",
    ]
    for name in sorted(n for n in registry.recipes if ours(registry.recipes.origin[n])):
        recipe = load_recipe(name, registry)
        text = registry.recipes[name].read_text(encoding="utf-8").strip()
        parts += ["", f"## {name}", "", f"{recipe.description}. From {registry.recipes.origin[name]}.", "", "```toml", text, "```"]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def dead_links(root: Path) -> Iterator[str]:
    """Relative links in *.md that lead nowhere, as "file: link"."""
    for page in sorted(root.rglob("*.md")):
        if any(part.startswith(".") or part in ("node_modules", "build", "dist") for part in page.relative_to(root).parts[:-1]):
            continue
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path = link.partition("#")[0]
            if path and ":" not in path and not (page.parent / path).exists():
                yield f"{page.relative_to(root)}: {link}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    from choosing import TEMPLATE, section
    from qcore.plugins import load_registry

    registry = load_registry()
    choosing, claims = section(TEMPLATE.read_text(encoding="utf-8"))
    for claim in claims:
        print(claim, file=sys.stderr)
    wrong = 1 if claims else 0
    for name, page in (("methods.md", methods_page(registry, choosing)), ("recipes.md", recipes_page(registry))):
        path = ROOT / "docs" / name
        if path.is_file() and path.read_text(encoding="utf-8") == page:
            continue
        if check:
            print(f"docs/{name} is out of date; run `make docs`", file=sys.stderr)
            wrong = 1
        else:
            path.write_text(page, encoding="utf-8")
            print(f"wrote docs/{name}")
    for dead in dead_links(ROOT):
        print(f"{dead} leads nowhere", file=sys.stderr)
        wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
