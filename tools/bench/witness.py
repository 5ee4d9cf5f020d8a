"""Show that an edit of the core changes no number, so that hundreds of cells need not be measured again.

    git worktree add ../before COMMIT                                   the code before the edit
    python tools/bench/evidence_moe.py --only tiny-moe/w3-awq-seed0     measure some cells here and there (PYTHONPATH: its packages), of every matrix
    python tools/bench/witness.py ../before cells/tiny-moe/w3-awq-seed0 … --files packages/… --why TEXT

What was measured in these witnesses must be the same to the last digit with either code, on one machine, and each of the edited files must have been
loaded by one of them.  Then docs/evidence/same.json says so, the edited files stand for those before them, as decisive.py reads it, and the witnesses
here are put back, with their seconds of a quiet machine.  One number that differs, and nothing is written.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decisive import SAME, edits, own_hash, standing, standing_of
from evidence import ROOT, code_hash

# what two runs of the same code do not share
OF_THE_RUN = {"code", "files", "seconds", "cpu_seconds", "phases", "load_average", "load1", "load1_end"}
OF_THE_RUN |= {"memory", "peak_bytes", "peak_rss_mib", "rss_before_mib"}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(where, what) of all that was measured."""
    if isinstance(value, dict):
        for key, own in value.items():
            if key not in OF_THE_RUN:
                yield from leaves(own, f"{path}/{key}")
    elif isinstance(value, list):
        for i, own in enumerate(value):
            yield from leaves(own, f"{path}/{i}")
    else:
        yield path, value


def differences(before: Any, after: Any) -> list[str]:
    """What is not the same in two measurements of a cell."""
    a, b = dict(leaves(before)), dict(leaves(after))
    changed = [path for path in sorted(a.keys() | b.keys()) if path not in a or path not in b or a[path] != b[path]]
    return [f"{path}: {a.get(path, 'nothing')} before, {b.get(path, 'nothing')} now" for path in changed]


def git(*argv: str) -> str:
    return subprocess.run(["git", *argv], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="WORKTREE", help="of the last commit before the edit, in which the witnesses were measured too")
    parser.add_argument("witnesses", nargs="+", metavar="CELL", help="below docs/evidence, without .json")
    parser.add_argument("--files", nargs="+", required=True, metavar="FILE", help="the edited files that these cells speak for")
    parser.add_argument("--why", required=True, metavar="TEXT", help="what was edited, and why it should change no number")
    a = parser.parse_args()
    since = git("-C", str(a.before.resolve()), "rev-parse", "HEAD").strip()
    before = edits(SAME.read_bytes() if SAME.exists() else b"[]")
    names = [f"docs/evidence/{cell}.json" for cell in a.witnesses]
    loaded: set[str] = set()
    other = 0
    for name in names:
        old, new = (json.loads((root / name).read_text()) for root in (a.before, ROOT))
        if old["code"] == new["code"]:
            print(f"{name} was not measured with both", file=sys.stderr)
            other += 1
        if found := differences(old, new):
            print(f"{name} has other numbers: {'; '.join(found[:5])}", file=sys.stderr)
            other += 1
        loaded |= set(new["files"])
    if other:
        return 1
    files = {}
    for name in a.files:
        own = standing_of(own_hash(Path(name).suffix, git("show", f"{since}:{name}").encode()), before)
        if own == standing(ROOT / name):
            print(f"{name} stands as it did: there is nothing to say", file=sys.stderr)
            return 1
        if name not in loaded:
            print(f"no witness loaded {name}: measure a cell that does", file=sys.stderr)
            return 1
        files[name] = [own, own_hash(Path(name).suffix, (ROOT / name).read_bytes())]
    entry = {"why": a.why, "since": since[:12], "files": files, "witnesses": sorted(a.witnesses)}
    same = json.loads(SAME.read_text()) if SAME.exists() else []
    git("checkout", "--", *names)
    cells = [file for file in SAME.parent.rglob("*.json") if names_of(file)]
    new = {cell: code for cell in cells if (code := code_hash(names_of(cell))) in cell.read_text()}
    SAME.write_text(json.dumps([*same, entry], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for cell, code in new.items():  # measured by the new code: its key has another name now
        cell.write_text(cell.read_text().replace(code, code_hash(names_of(cell))))
    print(f"{len(names)} cells have the same numbers; {len(files)} files stand for those before them")
    return 0


def names_of(cell: Path) -> list[str]:
    """The files of code that a cell names."""
    kept = json.loads(cell.read_text())
    files = kept.get("files") if isinstance(kept, dict) else None
    return files if isinstance(files, list) else []


if __name__ == "__main__":
    sys.exit(main())
