"""Show that an edit of the core changes no number, so that hundreds of cells need not be measured again.

    python tools/bench/evidence_moe.py --only tiny-moe/w3-awq     measure some cells anew, of every matrix that the edit could touch
    python tools/bench/witness.py --since COMMIT --why TEXT       compare them with what was measured before, and say so in docs/evidence/same.json

The witnesses are the cells that differ from those of the last commit of theirs: all that was measured in them must be the same to the last digit, and
every file that was edited since COMMIT and decides numbers must have been loaded by one of them.  Then the edited files stand for the ones before
them (decisive.py), and the witnesses are put back, with their seconds of a quiet machine.  One number that differs, and nothing is written.
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
    return [
        f"{path}: {a.get(path, 'nothing')} before, {b.get(path, 'nothing')} now" for path in sorted(a.keys() | b.keys()) if a.get(path) != b.get(path)
    ]


def git(*argv: str) -> str:
    return subprocess.run(["git", *argv], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", required=True, metavar="COMMIT", help="the last one before the edit")
    parser.add_argument("--why", required=True, metavar="TEXT", help="what was edited, and why it should change no number")
    a = parser.parse_args()
    since = git("rev-parse", a.since).strip()
    names = [n for n in git("diff", "--name-only", "HEAD", "--", "docs/evidence/cells").split() if n.endswith(".json")]
    witnesses: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names:
        old, new = git("show", f"HEAD:{name}"), json.loads((ROOT / name).read_text())
        if found := differences(json.loads(old), new):
            print(f"{name} has other numbers: {'; '.join(found[:5])}", file=sys.stderr)
            return 1
        witnesses[name] = old, new
    same = json.loads(SAME.read_text()) if SAME.exists() else []
    before = known(json.dumps(same).encode())
    files = {}
    for name in sorted({f for _, new in witnesses.values() for f in new["files"]}):
        file = ROOT / name
        old_code = subprocess.run(["git", "show", f"{since}:{name}"], cwd=ROOT, capture_output=True, check=False)
        if old_code.returncode:
            continue  # a new file: cells from before it do not name it
        own = standing_of(own_hash(file.suffix, old_code.stdout), before)
        if own != standing(file):
            files[name] = [own, own_hash(file.suffix, file.read_bytes())]
    edited = {n for n in git("diff", "--name-only", since, "--", "packages").split() if (ROOT / n).exists()}
    loaded = {f for cell in (ROOT / "docs" / "evidence" / "cells").rglob("*.json") for f in json.loads(cell.read_text()).get("files", [])}
    unseen = sorted(n for n in edited & loaded if n not in files and not _stands(n, since, before))
    if unseen:
        print(f"no witness loaded {', '.join(unseen)}: measure a cell that does", file=sys.stderr)
        return 1
    if not files:
        print("no edited file decides a number of a witness: there is nothing to say", file=sys.stderr)
        return 1
    entry = {"why": a.why, "since": since[:12], "files": files, "witnesses": sorted(n.removeprefix("docs/evidence/cells/") for n in names)}
    SAME.write_text(json.dumps([*same, entry], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, (old, _) in witnesses.items():
        (ROOT / name).write_text(old, encoding="utf-8")
    print(f"{len(names)} cells have the same numbers; {len(files)} files stand for those before them")
    return 0


def _stands(name: str, since: str, before: dict[str, str]) -> bool:
    """Whether a file counts as it did at a commit."""
    old = subprocess.run(["git", "show", f"{since}:{name}"], cwd=ROOT, capture_output=True, check=False)
    file = ROOT / name
    return bool(old.returncode) or standing_of(own_hash(file.suffix, old.stdout), before) == standing(file)


if __name__ == "__main__":
    sys.exit(main())
