"""Write docs/methods.md, docs/recipes.md and docs/systems.md from what is registered and measured, and check the rest of the documentation.

What methods.md says of when to use which method comes from choosing.txt, systems.md from systems.txt; the figures of both come from the cells of
docs/evidence (choosing.py), and a claim that the cells no longer bear out is an error.  So is a relative link that leads nowhere, and a command
`qcore …` in a code block that does not exist, has an option that it does not know, or names a recipe that is not there.

python tools/check_docs.py            write the three files
python tools/check_docs.py --check    write nothing; exit code 1 when one is out of date
"""

import argparse
import re
import shlex
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


def systems_page(filled: str) -> str:
    return f"<!-- written by tools/check_docs.py from tools/systems.txt; do not edit -->\n{filled}"


def wrong_systems(systems: str, registry: Any) -> Iterator[str]:
    """Rows of systems.txt that name recipes or commands that are not there, or call absent what a package brings."""
    for row in re.findall(r"^\| \[.*\|$", systems, flags=re.MULTILINE):
        _, what, _, run, _, more, _ = (cell.strip() for cell in row.split("|"))
        for name in re.findall(r"`([^`]+)`", run):
            command = name.removeprefix("qcore ")
            if name not in registry.recipes and (command == name or command.replace(" ", "-") not in registry.commands):
                yield f"tools/systems.txt: {what} is run with `{name}`, which is neither a recipe nor a plug-in's command"
        for package in re.findall(r"packages/(qplug-\w+)/README", more) if run == "not here" else ():
            hooks = [hook for record in registry.plugins if record.distribution == package for hook in record.hooks]
            if hooks:
                yield f"tools/systems.txt: {what} is not here, it says, but {package} brings {', '.join(hooks)}"


def command_lines(text: str) -> Iterator[list[str]]:
    """The words behind `qcore` in the code blocks of a page that a shell would be given; a line that ends in a backslash goes on in the next."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if language in ("", "console", "sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if m := re.match(r"(?:\$ )?(?:\w+=\S* )*(?:uv run |torchrun .*? -m )?qcore (.*)", line.strip()):
                    yield shlex.split(m[1], comments=True)


def wrong_commands(root: Path, registry: Any) -> Iterator[str]:
    """Commands in code blocks that qcore would refuse, as "file: what"."""
    import typer
    from qcore.cli import build
    from qcore.cli.plugins import mount_commands

    app = build()
    mount_commands(app, registry)
    top: Any = typer.main.get_command(app)
    for page in pages(root):
        for words in command_lines(page.read_text(encoding="utf-8")):
            command, rest = top, list(words)
            while rest and hasattr(command, "commands") and rest[0] in command.commands:
                command = command.commands[rest.pop(0)]
            where = f"{page.relative_to(root)}: qcore {' '.join(words)}"
            if hasattr(command, "commands"):
                if rest and rest[0] not in ("…", "--help"):
                    yield f"{where}: there is no command {rest[0]!r}"
                continue
            known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
            for word, value in zip(rest, [*rest[1:], ""], strict=False):
                option = word.partition("=")[0]
                if option.startswith("-") and option not in known and not option.lstrip("-").isdigit():
                    yield f"{where}: it has no option {option}"
                if option in ("--recipe", "-r") and "." not in value and value != "NAME" and value not in registry.recipes:
                    yield f"{where}: there is no recipe {value!r}"


def pages(root: Path) -> Iterator[Path]:
    """All *.md but those of folders that are made by tools."""
    for page in sorted(root.rglob("*.md")):
        if not any(part.startswith(".") or part in ("node_modules", "build", "dist") for part in page.relative_to(root).parts[:-1]):
            yield page


def dead_links(root: Path) -> Iterator[str]:
    """Relative links in *.md that lead nowhere, as "file: link"."""
    for page in pages(root):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path = link.partition("#")[0]
            if path and ":" not in path and not (page.parent / path).exists():
                yield f"{page.relative_to(root)}: {link}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    from choosing import SYSTEMS, TEMPLATE, section
    from qcore.plugins import load_registry

    registry = load_registry()
    wrong = 0
    filled = {}
    for template in (TEMPLATE, SYSTEMS):
        filled[template], claims = section(template.read_text(encoding="utf-8"))
        for claim in claims:
            print(f"tools/{template.name}: {claim}", file=sys.stderr)
            wrong = 1
    made = {"methods.md": methods_page(registry, filled[TEMPLATE]), "recipes.md": recipes_page(registry), "systems.md": systems_page(filled[SYSTEMS])}
    for name, page in made.items():
        path = ROOT / "docs" / name
        if path.is_file() and path.read_text(encoding="utf-8") == page:
            continue
        if check:
            print(f"docs/{name} is out of date; run `make docs`", file=sys.stderr)
            wrong = 1
        else:
            path.write_text(page, encoding="utf-8")
            print(f"wrote docs/{name}")
    said = [f"{dead} leads nowhere" for dead in dead_links(ROOT)]
    said += [*wrong_commands(ROOT, registry), *wrong_systems(filled[SYSTEMS], registry)]
    for line in said:
        print(line, file=sys.stderr)
    return 1 if said else wrong


if __name__ == "__main__":
    sys.exit(main())
