"""Time GPTQ on one layer, given its Gram matrix: qcore beside the peers' own per-layer routines, on the same weight and Gram.

    python tools/bench/gptq_speed.py --threads 2 \
        --peer llm-compressor=/tmp/peers/llm-compressor/bin/python --peer gptqmodel=/tmp/peers/gptqmodel/bin/python

Environments of peers: tools/bench/peers/make_env.sh.  Every tool gets threads of its own process, one after the other; the times are of the
solve alone, best of `--repeat`.  Losses are tr((W-Ŵ) H (W-Ŵ)ᵀ) / tr(W H Wᵀ), computed here from what each one returned.
One JSON line per tool, and all of them in docs/evidence/gptq_speed.json.  Run it on a quiet machine: on a shared one only the losses mean anything.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from qcore.numbers import int_weight
from qcore.solvers import GPTQ
from safetensors.torch import load_file, save_file

OUT = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "gptq_speed.json"


def make_problem(n: int, k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A weight, and the Gram of inputs that share a few strong directions and have channels of very different size."""
    g = torch.Generator().manual_seed(seed)
    rows = 2 * k
    x = torch.randn(rows, k // 16, generator=g) @ torch.randn(k // 16, k, generator=g) * 4 / k**0.5 + torch.randn(rows, k, generator=g)
    x *= torch.exp(0.5 * torch.randn(k, generator=g))
    return {"weight": torch.randn(n, k, generator=g) / k**0.5, "gram": x.T @ x / rows}


def loss(problem: dict[str, torch.Tensor], values: torch.Tensor) -> float:
    w, h = problem["weight"].double(), problem["gram"].double()
    d = w - values.double()
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def best_seconds(work, repeat: int) -> tuple[float, torch.Tensor]:
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        out = work()
        best = min(best, time.perf_counter() - start)
    return best, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    problem = make_problem(a.rows, a.cols)
    spec = int_weight(a.bits, a.group)
    shape = {"shape": [a.rows, a.cols], "bits": a.bits, "group": a.group, "threads": a.threads, "load": round(os.getloadavg()[0], 2)}

    variants = {"defaults": GPTQ(), "no sweep": GPTQ(sweeps=0), "paper": GPTQ(clip="none", sweeps=0, act_order=False, damp=0.01)}
    rows = []
    for name, solver in variants.items():
        seconds, q = best_seconds(lambda s=solver: s.solve(problem["weight"], spec, {"gram": problem["gram"]}), a.repeat)
        rows.append({"tool": f"qcore {name}", "solver": repr(solver), "seconds": round(seconds, 2), "loss": loss(problem, q.dequantize()), **shape})
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder) / "problem.safetensors", Path(folder) / "solved.safetensors"
        save_file(problem, given)
        for peer in a.peer:
            name, _, python = peer.partition("=")
            script = Path(__file__).parent / "peers" / f"layer_{name.replace('-', '_')}.py"
            command = [python, str(script), str(given), str(got), str(a.bits), str(a.group), str(a.threads), str(a.repeat)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                print(json.dumps({"tool": name, "error": run.stderr[-600:]}), flush=True)
                continue
            found = json.loads(run.stdout.strip().splitlines()[-1])
            rows.append({"tool": name, **found, "loss": loss(problem, load_file(got)["values"]), **shape})
            print(json.dumps(rows[-1]), flush=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
