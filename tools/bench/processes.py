"""Two processes against one, and two of which one is killed: docs/evidence/processes.json.

    python tools/bench/processes.py

Each run: `qcore quantize zoo:tiny-llama`, alone and under torchrun with two gloo processes.  Rounding without data must give the same bytes; GPTQ
differs by the order of sums, and then by codes that tip over.  At last process 1 is killed when the first block is finished, and the run resumed.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "evidence" / "processes.json"
SETTINGS = ["--set", "calibration.samples=16", "--eval-tokens", "4096", "--json"]


def command(recipe: str, out: Path, processes: int, *more: str) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *start, "-m", "qcore", "quantize", "zoo:tiny-llama", "-r", recipe, *SETTINGS, *more, "-o", str(out)]


def run(recipe: str, out: Path, processes: int, *more: str) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(recipe, out, processes, *more), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{recipe} with {processes} processes failed:\n{done.stderr[-3000:]}")
    report = json.loads((out / "report.json").read_text())
    return {"recipe": recipe, "processes": processes, "kl": report["quality"]["scores"]["kl"], "quantize_seconds": report["seconds"]["quantize"]}


def weights(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def codes_that_differ(a: Path, b: Path) -> float:
    """The share of 4-bit codes that are not the same."""
    import torch
    from safetensors.torch import load_file

    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    differ = total = 0
    for name in one:
        if name.endswith("weight_packed"):
            x, y = one[name].view(torch.uint8), other[name].view(torch.uint8)
            differ += int(((x & 15) != (y & 15)).sum() + ((x >> 4) != (y >> 4)).sum())
            total += 2 * x.numel()
    return differ / total


def killed(scratch: Path) -> dict[str, Any]:
    """Kill process 1 after the first block, read what is said, and resume."""
    out = scratch / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command("w4a16-gptq", out, 2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    first = out.with_name("killed.run") / "block-00000.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            os.kill(int(child), signal.SIGKILL)
    _, said = process.communicate()
    finished = len(list(out.with_name("killed.run").glob("block-*.json")))
    message = next((line for line in said.splitlines() if line.startswith("error:")), "")
    resumed = run("w4a16-gptq", out, 2, "--resume")
    return {"said": message, "exit_code": process.returncode, "finished_blocks": finished, "resumed_kl": resumed["kl"]}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rows = [run(recipe, scratch / f"{recipe}-{n}", n) for recipe in ("w4a16-rtn", "w4a16-gptq") for n in (1, 2)]
        result = {
            "settings": " ".join(SETTINGS),
            "threads_per_process": 1,
            "runs": rows,
            "rtn_same_bytes": weights(scratch / "w4a16-rtn-1") == weights(scratch / "w4a16-rtn-2"),
            "gptq_codes_that_differ": round(codes_that_differ(scratch / "w4a16-gptq-1", scratch / "w4a16-gptq-2"), 4),
            "killed": killed(scratch) | {"uninterrupted_equal": weights(scratch / "killed") == weights(scratch / "w4a16-gptq-2")},
        }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
