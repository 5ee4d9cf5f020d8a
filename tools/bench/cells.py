"""What the scripts `evidence_*.py` do alike: find the cells that are missing, compute and write them one by one, then write the page."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from evidence import ROOT, code_files, code_hash, missing


def compute(
    doc: str | None,
    cells: Sequence[Any],
    measure: Callable[[Any], dict[str, Any]],
    said: Callable[[dict[str, Any]], str],
    finish: Callable[[Sequence[Any]], Any],
    *,
    ensure_ascii: bool = True,
) -> int:
    """The whole of such a script, by its command line; → its exit code.

    doc:     of the script
    cells:   dataclasses with a `name`, a `file` and a `recipe`
    measure: one cell; "code" and "files" are added where it gives none.  A process of its own that fails is counted, and the next one begins
    said:    what is printed of a result
    finish:  writes the page from the cells that are there
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which cells are missing")
    parser.add_argument("--table", action="store_true", help="write the page from the cells that are there")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--limit", type=int, default=1000, help="at most this many cells")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after so long")
    a = parser.parse_args()
    todo = [] if a.table else [c for c in missing(cells) if a.only in c.name][: a.limit]
    print(f"{len(todo)} of {len(cells)} cells are missing", file=sys.stderr)
    if a.list:
        print("\n".join(c.name for c in todo))
        return 0
    begun, failed = time.perf_counter(), 0
    for cell in todo:
        started = time.perf_counter()
        if started - begun > 60 * a.minutes:
            break
        try:
            result = measure(cell)
        except subprocess.CalledProcessError as e:
            print(f"{cell.name}: failed\n{(e.stderr or '')[-2000:]}", file=sys.stderr)
            failed += 1
            continue
        write(cell, result, ensure_ascii)
        print(f"{cell.name}: {said(result)} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    finish(cells)
    return 1 if failed else 0


def write(cell: Any, result: dict[str, Any], ensure_ascii: bool = True) -> None:
    """The cell's file, whole or not there."""
    kept = {"cell": asdict(cell), **result}
    kept.setdefault("files", code_files(cell.recipe))
    kept.setdefault("code", code_hash(kept["files"]))
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    part = cell.file.with_suffix(".part")
    part.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=ensure_ascii) + "\n", encoding="utf-8")
    part.replace(cell.file)


def in_a_process(script: str, cell: Any) -> dict[str, Any]:
    """What `script --cell JSON` prints of one cell; CalledProcessError where it fails."""
    argv = [sys.executable, script, "--cell", json.dumps(asdict(cell))]
    run = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result
