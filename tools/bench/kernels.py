"""Time the CPU kernels on single layers, beside torch's own, and tokens a second of a whole model.

    python tools/bench/kernels.py                                              layers, one thread, a table
    python tools/bench/kernels.py --json docs/evidence/kernels.json --table docs/evidence/kernels.md
    python tools/bench/kernels.py --generate zoo:smollm2-135m CHECKPOINT       tokens a second, float32, bfloat16 and the checkpoint

All candidates of one layer and number of rows run in turn, call by call, so a busy moment hits all of them alike; the median and the 10th and 90th
percentile are kept.  One row is multiplied with copies of the weight that together are larger than the caches.  Times of int8 inputs include
rounding them.  On a shared machine read the ratios.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from qcore.cli.bench import machine, read_bandwidth
from qkernels import int_linear, native, panels, quantize_rows, weight_linear
from torch.nn.functional import linear

SHAPES = {  # N, K, group
    "4096 × 4096, groups of 128": (4096, 4096, 128),
    "4096 × 4096, groups of 32": (4096, 4096, 32),
    "576 × 576, groups of 64": (576, 576, 64),
    "1536 × 576, groups of 64": (1536, 576, 64),
    "576 × 1536, groups of 192": (576, 1536, 192),
}
ROWS = (1, 16, 128)
COLD = 96 << 20  # bytes


def candidates(n: int, k: int, group: int, rows: int) -> dict[str, tuple[int, list[Callable[[], Any]]]]:
    """Name → (bytes of the weight, calls on copies of it)."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=g) / k**0.5
    x = torch.randn(rows, k, generator=g)
    half = x.bfloat16()
    scale = torch.rand(n, k // group, generator=g) * 0.02 + 1e-3
    codes4 = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
    codes8 = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    int4 = panels.pack(codes4, scale.half(), bits=4)
    int8 = panels.pack(codes8, scale[:, :1].contiguous(), bits=8)
    found: dict[str, tuple[int, list[Callable[[], Any]]]] = {}

    def add(name: str, size: int, make: Callable[[], Callable[[], Any]]) -> None:
        count = -(-COLD // size) if rows == 1 else 1
        found[name] = size, [make() for _ in range(min(count, 256))]

    def laid(p: panels.Panels) -> panels.Panels:
        return panels.Panels(p.codes.clone(), p.scale.clone(), None, p.shape, p.group, p.bits)

    add("float32", n * k * 4, lambda: partial(linear, x, weight.clone()))
    add("bfloat16", n * k * 2, lambda: partial(linear, half, weight.bfloat16()))
    if native.why_not() is None:
        add("native int4, float32 inputs", int4.nbytes, lambda: partial(weight_linear.cpu.weight_linear, x, laid(int4)))
        add("native int4, bfloat16 inputs", int4.nbytes, lambda: partial(weight_linear.cpu.weight_linear, half, laid(int4)))
        add("native int4, int8 inputs", int4.nbytes, lambda: partial(int_linear.cpu.int_linear, x, laid(int4)))
        add("native int8, float32 inputs", int8.nbytes, lambda: partial(weight_linear.cpu.weight_linear, x, laid(int8)))
        add("native int8, int8 inputs", int8.nbytes, lambda: partial(int_linear.cpu.int_linear, x, laid(int8)))
        add("torch _int_mm, int8 inputs", n * k, lambda: partial(int_mm, x, codes8.clone(), scale[:, 0]))
        prepack = getattr(torch.ops.onednn, "qlinear_prepack", None)
        if prepack is not None:
            add("oneDNN int8, int8 inputs", n * k, lambda: partial(onednn, x, prepack(codes8.t(), [rows, k]), scale[:, 0].contiguous()))
    if group in (32, 64, 128, 256):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes4.int() + 8, 1)
        both = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().bfloat16()
        size = n * k // 2 + both.numel() * 2
        mm = torch.ops.aten._weight_int4pack_mm_for_cpu
        add("torch int4, bfloat16 inputs", size, lambda: partial(mm, half, packed.clone(), group, both))
    return found


def int_mm(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    q, s = quantize_rows.cpu.quantize_rows(x)
    return torch._int_mm(q, w.t()).float() * s * scale


def onednn(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    q, s = quantize_rows.cpu.quantize_rows(x)
    # signed inputs take a reference loop of half a second where there is no AMX, so they are raised by 128
    raised = q.view(torch.uint8) ^ 0x80
    zero = torch.zeros(len(scale), dtype=torch.int32)
    y = torch.ops.onednn.qlinear_pointwise(raised, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return y * s


def in_turn(calls: dict[str, list[Callable[[], Any]]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each candidate, one call of each after the other."""
    working = {}
    for name, own in calls.items():
        try:
            own[0]()
        except RuntimeError as e:
            print(f"{name}: {str(e).splitlines()[0]}", file=sys.stderr)
            continue
        working[name] = own
    times: dict[str, list[float]] = {name: [] for name in working}
    started, i = time.perf_counter(), 0
    while i < 7 or time.perf_counter() - started < seconds:
        for name, own in working.items():
            call = own[i % len(own)]
            before = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - before))
        i += 1
    return times


def layers(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for shape, (n, k, group) in SHAPES.items():
        for t in ROWS:
            found = candidates(n, k, group, t)
            for name, times in in_turn({name: calls for name, (_, calls) in found.items()}, seconds).items():
                ms = statistics.median(times)
                cuts = statistics.quantiles(times, n=10)
                row = {"shape": shape, "rows": t, "kernel": name, "ms": ms, "p10": cuts[0], "p90": cuts[-1], "runs": len(times)}
                rows.append(row | ({"gb_s": found[name][0] / ms / 1e6} if t == 1 else {}))
    return rows


def tokens_per_second(model: Any, new: int = 64, prompt: int = 16, repeat: int = 3) -> float:
    """Of `generate` with its cache, one sequence, greedy; the median of some runs."""
    ids = torch.randint(0, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    speeds = []
    for _ in range(repeat + 1):
        before = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        speeds.append(new / (time.perf_counter() - before))
    return statistics.median(speeds[1:])


def generate(uri: str, checkpoint: Path) -> dict[str, float]:
    from qcore.checkpoint import load
    from qcore.model import load_source, materialize
    from qcore.modules import serve_in
    from qcore.plugins import load_registry

    own = load_registry()
    found = {}
    for name, dtype, kernel in (
        ("W4, float32", torch.float32, None),
        ("W4, bfloat16", torch.bfloat16, None),
        ("W4, float32, inputs rounded to int8 by wish", torch.float32, "native-int8-by-wish"),
    ):
        model = load(checkpoint, registry=own, kernel=kernel)
        serve_in(model, dtype)
        found[name] = tokens_per_second(model)
    loaded = load_source(uri, own.sources)
    if any(p.is_meta for p in loaded.model.parameters()):
        materialize(loaded.model, "", loaded.reader)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        serve_in(loaded.model, dtype)
        found[name] = tokens_per_second(loaded.model)
    return found


def table(record: dict[str, Any]) -> str:
    """Markdown: one table a shape, one column a number of rows."""
    m = record["machine"]
    lines = [
        "# Kernels",
        "",
        "Made by `python tools/bench/kernels.py --json docs/evidence/kernels.json --table docs/evidence/kernels.md`, and with `--generate`.",
        "Milliseconds, medians of calls in turn; int8 inputs with their rounding.",
        f"{m['processor']} ({m['instructions']}), torch {m['torch']}, {record['threads']} thread(s), load {record['load']}; "
        f"torch.sum of cold float32 reads {record['read_gb_s']:.1f} GB/s. A shared machine: read ratios.",
        "",
    ]
    for shape in dict.fromkeys(r["shape"] for r in record["rows"]):
        lines += [f"## {shape}", "", "| | 1 row | GB/s | 16 rows | 128 rows |", "|---|---|---|---|---|"]
        own = [r for r in record["rows"] if r["shape"] == shape]
        for name in dict.fromkeys(r["kernel"] for r in own):
            by_rows = {r["rows"]: r for r in own if r["kernel"] == name}
            cells = [f"{by_rows[t]['ms']:.3f}" if t in by_rows else "–" for t in ROWS]
            rate = f"{by_rows[1]['gb_s']:.1f}" if 1 in by_rows else "–"
            lines.append(f"| {name} | {cells[0]} | {rate} | {cells[1]} | {cells[2]} |")
        lines.append("")
    if "tokens_per_second" in record:
        lines += [
            f"## Tokens a second, {record['model']}",
            "",
            "`generate` with its cache, 16 tokens given, 64 made, one sequence.",
            "",
            "| | |",
            "|---|---|",
        ]
        lines += [f"| {name} | {speed:.1f} |" for name, speed in record["tokens_per_second"].items()] + [""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each shape and number of rows")
    parser.add_argument("--generate", nargs=2, metavar=("MODEL", "CHECKPOINT"), help="measure tokens a second instead of layers")
    parser.add_argument("--json", type=Path, help="write here; what another run measured of the other kind is kept")
    parser.add_argument("--table", type=Path, help="write the table of all that is in --json here")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {"rows": []}
    record |= {"machine": machine(), "threads": options.threads, "load": round(os.getloadavg()[0], 1)}
    with torch.no_grad():
        if options.generate:
            record |= {"model": options.generate[0], "tokens_per_second": generate(options.generate[0], Path(options.generate[1]))}
        else:
            record |= {"read_gb_s": read_bandwidth(0.5), "rows": layers(options.seconds)}
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.table:
        options.table.write_text(table(record))
    if not options.table:
        print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
