"""Fuzzing at length: docs/evidence/fuzz.json.

    python tools/bench/fuzz.py --examples 3000

Runs the fuzz tests of damaged checkpoints, manifests, indices, recipes, safetensors headers and GGUF files, each with so many examples, and counts
what pytest and hypothesis report.  A crash, a hang, memory beyond the bound or any error but QcoreError fails the test, and this script.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "evidence" / "fuzz.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=3000)
    examples = parser.parse_args().examples
    files = sorted(f for f in ROOT.glob("packages/*/tests/**/test_*.py") if "QCORE_FUZZ_EXAMPLES" in f.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "--hypothesis-show-statistics", "-p", "no:cacheprovider", *map(str, files)]
    started = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"QCORE_FUZZ_EXAMPLES": str(examples)})
    tests: dict[str, int] = {}
    test = ""
    for line in run.stdout.splitlines():  # "packages/…::test_x:", then per phase "    - 3000 passing, 0 failing, and 12 invalid test cases"
        if found := re.match(r"packages/\S+::(\S+):$", line):
            test = found[1]
        elif found := re.match(r"\s+- (\d+) passing, ", line):
            tests[test] = tests.get(test, 0) + int(found[1])
    result = {
        "command": f"QCORE_FUZZ_EXAMPLES={examples} pytest " + " ".join(f.relative_to(ROOT).as_posix() for f in files),
        "tests": tests,
        "examples": sum(tests.values()),
        "failed": run.returncode != 0,
        "seconds": round(time.perf_counter() - started, 1),
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if run.returncode:
        raise SystemExit(run.stdout[-3000:])


if __name__ == "__main__":
    main()
