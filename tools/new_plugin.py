"""Write a new plug-in: a folder that installs, registers one class, and whose conformance test passes at once.

    python tools/new_plugin.py ternary
    python tools/new_plugin.py log-two --kind format --into packages
    python tools/new_plugin.py warp --kind transform --into ~/src

The templates beside this script, in `scaffold/`, are plug-ins themselves, of the name "scaffold": this script copies one and puts the new
name in.  Exit code 2, and a sentence, when the name does not do or the folder is there already.
"""

import argparse
import keyword
import re
import sys
from pathlib import Path

TEMPLATES = Path(__file__).parent / "scaffold"
PACKAGES = Path(__file__).parents[1] / "packages"
KINDS = ("format", "transform", "solver", "adapter")


def new_plugin(name: str, kind: str, into: Path) -> Path:
    """Write the plug-in `qplug-<name>` below `into`; → its folder.  ValueError for a bad name, FileExistsError if the folder is there."""
    name = name.removeprefix("qplug-")
    snake = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(snake):
        raise ValueError(f"{name!r} is no name for a plug-in; use lower-case letters, digits and hyphens, as in 'ternary' or 'log-two'")
    if not into.is_dir():
        raise FileNotFoundError(f"{into} is not a folder; create it, or choose another with --into")
    folder = into / f"qplug-{name}"
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another name, another --into, or remove it")
    package = folder / "src" / f"qplug_{snake}"
    files = {
        "pyproject.toml": folder / "pyproject.toml",
        "README.md": folder / "README.md",
        f"{kind}/__init__.py": package / "__init__.py",
        f"{kind}/scaffold.py": package / f"{snake}.py",
        f"{kind}/test_conformance.py": folder / "tests" / "test_conformance.py",
    }
    words = {
        "qplug_scaffold.scaffold": f"qplug_{snake}.{snake}",
        "qplug_scaffold": f"qplug_{snake}",
        "test_scaffold": f"test_{snake}",
        "Scaffold": "".join(part.capitalize() for part in name.split("-")),
        "scaffold": name,
        "KIND": kind,
    }
    pattern = re.compile("|".join(map(re.escape, words)))  # the longest of two that begin alike stands first above
    for template, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        target.write_text(pattern.sub(lambda m: words[m.group()], text), encoding="utf-8")
    return folder


def main(argv: list[str] | None = None) -> int:
    assert __doc__ is not None
    head, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what it adds, in lower case: ternary, log-two")
    parser.add_argument("--kind", choices=KINDS, default="format", help="what it adds (default: format)")
    parser.add_argument("--into", type=Path, default=PACKAGES, metavar="DIR", help="where to write qplug-NAME (default: packages/)")
    args = parser.parse_args(argv)
    try:
        folder = new_plugin(args.name, args.kind, args.into.expanduser())
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"wrote {folder}")
    print(f"  prove it:    python -m pytest {folder}")
    print(f"  install it:  uv pip install --no-deps -e {folder}")
    print("  see it:      qcore plugins list")
    return 0


if __name__ == "__main__":
    sys.exit(main())
