"""`qcore bench`: what each kernel makes of a model's own layers on this machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from qcore.cli._options import JsonOption, registry

ROWS = (1, 16, 128)
COLD = 96 << 20  # bytes of copies of a weight that are read in turn, so that none waits in a cache


def bench(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `qcore quantize` wrote.", show_default=False)],
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of every measurement.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="Of each measurement.")] = 0.2,
    as_json: JsonOption = False,
) -> None:
    """Time every kernel that can run a checkpoint's layers, beside the float layer, for 1, 16 and 128 rows.

    Each kind of layer (shape and spec) is measured once. One row is timed on copies of the weight that no cache holds, as in a large model; GB/s are
    bytes that the kernel reads over that time.

    Example: qcore bench out/ --threads 2
    """
    from qcore.checkpoint import MANIFEST, load
    from qcore.cli._show import print_json, table
    from qcore.errors import NotFound, SpecError

    if threads > (there := os.cpu_count() or 1):
        raise SpecError(f"--threads {threads} is more than this machine has, {there}; times would be of threads that wait for one another")

    if not (checkpoint / MANIFEST).is_file():
        raise NotFound(f"{checkpoint} is no qcore checkpoint: it has no {MANIFEST}; pass the -o of `qcore quantize`")
    own = registry()
    card = speed_card(load(checkpoint, registry=own), own, threads, seconds)
    if as_json:
        print_json(card)
        return
    machine = card["machine"]
    print(f"{machine['processor']}, {machine['instructions'] or 'no native kernels'}, {threads} thread(s)")
    print(f"torch.sum reads {card['read_gb_s']:.1f} GB/s")
    lines = []
    for r in card["rows"]:
        verdict = "" if r["kernel"] == "float" else "slower than float here" if r["speed_up"] < 1 else f"{r['speed_up']:.1f}×"
        rate = f"{r['gb_s']:.1f}" if r["rows"] == 1 else ""
        lines.append((r["layer"], r["weight"], str(r["rows"]), r["kernel"], f"{r['ms']:.3f}", rate, verdict, "runs" if r["chosen"] else ""))
    table(("layer", "weight", "rows", "kernel", "ms", "GB/s", "", ""), lines, right=(2, 4, 5))


def speed_card(model: Any, own: Any, threads: int, seconds: float) -> dict[str, Any]:
    """Machine, its read bandwidth, and one row for each kind of layer, number of rows and kernel."""
    import torch

    from qcore.modules import QuantizedLinear

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    kinds: dict[tuple[Any, ...], tuple[str, QuantizedLinear]] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            kinds.setdefault((module.shape, module.spec, module.activation), (path, module))
    try:
        with torch.no_grad():
            rows = [row for path, module in kinds.values() for row in _layer(path, module, own, seconds)]
            return {"machine": machine(), "threads": threads, "read_gb_s": read_bandwidth(seconds), "rows": rows}
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """What a time depends on."""
    import torch
    from qkernels import native

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": name, "instructions": ", ".join(native.instruction_sets()), "torch": torch.__version__, "system": platform.platform()}


def read_bandwidth(seconds: float) -> float:
    """GB/s of adding up numbers that no cache holds."""
    import torch

    data = torch.ones(64 << 20)
    return data.numel() * 4 / milliseconds([data.sum], seconds) / 1e6


def milliseconds(calls: "list[Callable[[], Any]]", seconds: float) -> float:
    """The median time of one call, taken in turn, of as many as fit into `seconds`; five at least."""
    calls[0]()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        call = calls[len(times) % len(calls)]
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def _layer(path: str, module: Any, own: Any, seconds: float) -> list[dict[str, Any]]:
    from functools import partial

    import torch
    from torch.nn.functional import linear

    kernels = sorted((k() for k in own.kernels.values()), key=lambda k: k.rank)
    job, parts = module._job, module.stored()
    stored = sum(t.numel() * t.element_size() for t in parts.values())
    weight = module.dequantize().to(job.dtype)
    found = []
    for rows in ROWS:
        x = torch.randn(rows, job.shape[1], generator=torch.Generator().manual_seed(0)).to(job.dtype)

        def copies(size: int, rows: int = rows) -> int:
            return max(1, -(-COLD // size)) if rows == 1 else 1

        weights = [weight.clone() for _ in range(copies(weight.numel() * weight.element_size()))]
        base = milliseconds([partial(linear, x, w) for w in weights], seconds)
        shared = {"layer": path, "shape": list(job.shape), "weight": str(module.spec), "rows": rows, "dtype": str(job.dtype).removeprefix("torch.")}
        read = weight.numel() * weight.element_size() / base / 1e6
        found.append(shared | {"kernel": "float", "ms": base, "gb_s": read, "speed_up": 1.0, "chosen": False})
        for kernel in kernels:
            if kernel.op != job.op or kernel.refuses(job) is not None:
                continue
            one = kernel.prepare(parts, job)
            size = sum(t.numel() * t.element_size() for name, t in one.items() if name not in parts) or stored
            prepared = [one] + [{name: t.clone() for name, t in one.items()} for _ in range(min(copies(size), 512) - 1)]
            ms = milliseconds([partial(kernel, x, p, job) for p in prepared], seconds)
            chosen = kernel.name == module.explain().kernel.name
            found.append(shared | {"kernel": kernel.name, "ms": ms, "gb_s": size / ms / 1e6, "speed_up": base / ms, "chosen": chosen})
    return found
