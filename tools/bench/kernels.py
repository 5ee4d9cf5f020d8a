"""Time every kernel on one layer, beside float: which one is worth being chosen on this machine.

    python tools/bench/kernels.py                     K = N = 1024, 1 and 128 rows
    python tools/bench/kernels.py --size 4096 --json

One thread, the median of several runs, all in one process.  On a shared machine read the ratios, not the milliseconds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from qcore.numbers import fp8_activation, fp8_weight, int_activation, int_weight, quantize
from qcore.ops.kernel import Job
from qcore.packing import first_that_accepts
from qcore.plugins import load_registry

CASES = {
    "w8a16": (int_weight(8), None),
    "w4a16 group 64": (int_weight(4, 64), None),
    "w3a16 group 64": (int_weight(3, 64), None),
    "w8a8": (int_weight(8), int_activation()),
    "fp8": (fp8_weight(), fp8_activation()),
}


def milliseconds(call: Callable[[], Any], seconds: float) -> float:
    """The median of as many runs as fit into `seconds`, three at least."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def measure(size: int, seconds: float) -> list[dict[str, Any]]:
    """One row per case, dtype, number of rows and kernel that accepts it."""
    registry = load_registry()
    kernels = sorted((cls() for cls in registry.kernels.values()), key=lambda k: k.rank)
    packings = [cls() for cls in registry.packings.values()]
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for t in (1, 128):
            x = torch.randn(t, size, generator=torch.Generator().manual_seed(1)).to(dtype)
            base = milliseconds(partial(torch.nn.functional.linear, x, weight.to(dtype)), seconds)
            for case, (spec, activation) in CASES.items():
                packing = first_that_accepts(packings, spec, (size, size), activation)
                unpack = partial(packing.unpack, spec=spec, shape=(size, size))
                job = Job("linear", packing.name, spec, (size, size), activation, dtype=dtype, unpack=unpack)
                parts = packing.pack(quantize(weight, spec))
                for kernel in kernels:
                    if kernel.op == "linear" and kernel.refuses(job) is None:
                        ms = milliseconds(partial(kernel, x, kernel.prepare(parts, job), job), seconds)
                        name = str(dtype).removeprefix("torch.")
                        rows.append(
                            {"case": case, "dtype": name, "rows": t, "kernel": kernel.name, "ms": ms, "float_ms": base, "speed_up": base / ms}
                        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="N = K")
    parser.add_argument("--seconds", type=float, default=0.1, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = measure(options.size, options.seconds)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'case':<16}{'dtype':<10}{'rows':>5}  {'kernel':<28}{'ms':>9}{'float ms':>10}{'speed-up':>10}")
    for r in rows:
        print(f"{r['case']:<16}{r['dtype']:<10}{r['rows']:>5}  {r['kernel']:<28}{r['ms']:>9.3f}{r['float_ms']:>10.3f}{r['speed_up']:>9.2f}×")
    return 0


if __name__ == "__main__":
    sys.exit(main())
