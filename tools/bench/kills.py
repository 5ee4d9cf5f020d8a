"""Runs killed with SIGKILL at random moments, resumed, and compared with one that was left alone.

    python tools/bench/kills.py --kills 20        docs/evidence/kills.json

Each run: `qcore quantize zoo:tiny-llama -r w4a16-gptq` with few samples; the moment is drawn evenly over the time that the whole run takes after its
imports.  Every second run is streamed, and every other one of those is resumed in memory.  All files but report.* and proof.json must be equal.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "evidence" / "kills.json"
COMMAND = ["quantize", "zoo:tiny-llama", "-r", "w4a16-gptq", "--set", "calibration.samples=16", "--eval-tokens", "1024", "--json"]


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file whose bytes are promised."""
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.iterdir())
        if f.name != "proof.json" and not f.name.startswith("report.")
    }


def run(out: Path, *more: str, kill_after: float | None = None) -> tuple[int, float, str]:
    """(exit code, seconds, last line of stderr) of one run.  kill_after: seconds"""
    started = time.monotonic()
    command = [sys.executable, "-m", "qcore", *COMMAND, "-o", str(out), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
    return process.returncode, time.monotonic() - started, (said.strip().splitlines() or [""])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        code, seconds, _ = run(whole)
        assert code == 0, "the run that nobody kills failed"
        wanted = hashes(whole)
        i = -1
        while sum(r["killed"] for r in rows) < options.kills and i < 5 * options.kills:
            i += 1
            out, first = Path(scratch) / f"out{i}", ["--stream"] if i % 2 else []
            then = ["--stream"] if i % 4 == 1 else []
            moment = draw.uniform(0.3, 1.0) * seconds
            code, _, _ = run(out, *first, kill_after=moment)
            done = len(list((out.parent / f"{out.name}.run").glob("block-*.json")))
            if code == 0 or (out.exists() and not out.with_name(f"{out.name}.run").exists()):  # it had ended, but for its last instructions
                rows.append({"moment": round(moment / seconds, 3), "killed": False, "equal": hashes(out) == wanted})
                continue
            resumed, _, said = run(out, "--resume", *then)
            left = sorted(p.name for p in out.parent.iterdir() if out.name in p.name and p != out)
            row = {"moment": round(moment / seconds, 3), "killed": True, "streamed": [bool(first), bool(then)], "finished_blocks": done}
            row |= {"resumed": resumed == 0, "equal": resumed == 0 and hashes(out) == wanted, "left_behind": left}
            if resumed:
                row["said"] = said
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {"command": "qcore " + " ".join(COMMAND), "seed": options.seed, "seconds_of_a_whole_run": round(seconds, 1), "files": len(wanted)}
    result |= {"kills": sum(r["killed"] for r in rows), "equal": sum(r["equal"] for r in rows), "runs": rows}
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['equal']} of {len(rows)} equal; {OUT.relative_to(ROOT)}")
    if result["equal"] != len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
