"""Show that an edit of the core changes no number, so that hundreds of cells need not be measured again.

    python tools/bench/evidence_moe.py --only tiny-moe/w3-awq-seed0         measure some cells anew, of every matrix that the edit could touch
    python tools/bench/witness.py --since COMMIT --why TEXT cells/tiny-moe/w3-awq-seed0 …   compare them with what was measured before

What was measured in these witnesses must be the same to the last digit as in the last commit, and every file that was edited since COMMIT and that
some cell names must have been loaded by one of them.  Then docs/evidence/same.json says so, the edited files stand for those before them, as
decisive.py reads it, and the witnesses are put back, with their seconds of a quiet machine.  One number that differs, and nothing is written.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decisive import SAME, own_hash, standing, standing_of
from decisive import _before as known
from evidence import ROOT

CODE = ("*.py", "*.toml")
# what two runs of the same code do not share
OF_THE_RUN = {"code", "files", "seconds", "phases", "memory", "load_average", "cpu_seconds", "peak_bytes"}


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
    parser.add_argument("witnesses", nargs="+", metavar="CELL", help="below docs/evidence, without .json")
    parser.add_argument("--since", required=True, metavar="COMMIT", help="the last one before the edit")
    parser.add_argument("--why", required=True, metavar="TEXT", help="what was edited, and why it should change no number")
    a = parser.parse_args()
    since = git("rev-parse", a.since).strip()
    before = known(SAME.read_bytes() if SAME.exists() else b"[]")
    witnesses: dict[str, str] = {}
    loaded: set[str] = set()
    other = 0
    for cell in a.witnesses:
        name = f"docs/evidence/{cell}.json"
        old, new = git("show", f"HEAD:{name}"), json.loads((ROOT / name).read_text())
        if json.loads(old)["code"] == new["code"]:
            print(f"{cell} was not measured anew", file=sys.stderr)
            other += 1
        if found := differences(json.loads(old), new):
            print(f"{cell} has other numbers: {'; '.join(found[:5])}", file=sys.stderr)
            other += 1
        witnesses[name] = old
        loaded |= set(new["files"])
    if other:
        return 1
    files, unseen = {}, []
    named = {f for cell in SAME.parent.rglob("*.json") if cell != SAME for f in names_of(cell)}
    for name in sorted(named & set(git("diff", "--name-only", "--diff-filter=M", since, "--", *CODE).split())):
        file = ROOT / name
        own = standing_of(own_hash(file.suffix, git("show", f"{since}:{name}").encode()), before)
        if own == standing(file):
            continue
        files[name] = [own, own_hash(file.suffix, file.read_bytes())]
        if name not in loaded:
            unseen.append(name)
    if unseen or not files:
        print(
            f"no witness loaded {', '.join(unseen)}: measure a cell that does" if unseen else "nothing was edited that a cell names", file=sys.stderr
        )
        return 1
    entry = {"why": a.why, "since": since[:12], "files": files, "witnesses": sorted(a.witnesses)}
    same = json.loads(SAME.read_text()) if SAME.exists() else []
    SAME.write_text(json.dumps([*same, entry], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, old in witnesses.items():
        (ROOT / name).write_text(old, encoding="utf-8")
    print(f"{len(witnesses)} cells have the same numbers; {len(files)} files stand for those before them")
    return 0


def names_of(cell: Path) -> list[str]:
    """The files of code that a cell names."""
    kept = json.loads(cell.read_text())
    return kept.get("files", []) if isinstance(kept, dict) else []


if __name__ == "__main__":
    sys.exit(main())
