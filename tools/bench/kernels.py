"""Time the CPU kernels on single layers, beside torch's own and those of other libraries, and tokens a second of a whole model.

    python tools/bench/kernels.py                                              layers, one thread, a table
    python tools/bench/kernels.py --json docs/evidence/kernels.json --table docs/evidence/kernels.md --generate zoo:smollm2-135m

The second measures all: about five minutes on a machine that does nothing else.

Peers: ONNX Runtime (MatMulNBits) and ggml (Q4_0, Q4_K) where they are found.  They are not in the workspace's lock; peers/make_env.sh makes folders
for `--peers`, see peers/README.md.  Peers that were absent are named in the table.

All candidates of one layer and number of rows run in turn, call by call, in a new order each time, so a busy moment hits all of them alike; the
median and the 10th and 90th percentile are kept.  One row is multiplied with copies of the weight that together are larger than the caches.  Times of
int8 inputs include rounding them.  On a shared machine read the ratios, or take --cpu-time.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from qcore.cli.bench import machine, read_bandwidth
from qkernels import int_linear, native, panels, quantize_rows, weight_linear
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import layer_ggml
import layer_onnxruntime

SHAPES = {  # N, K, group
    "4096 × 4096, groups of 128": (4096, 4096, 128),
    "4096 × 4096, groups of 32": (4096, 4096, 32),
    "576 × 576, groups of 64": (576, 576, 64),
    "1536 × 576, groups of 64": (1536, 576, 64),
    "576 × 1536, groups of 192": (576, 1536, 192),
}
ROWS = (1, 16, 128)
COLD = 96 << 20  # bytes


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer: the bytes of its weight, a maker of calls on copies of it, and the exact result where it is known."""

    size: int
    make: Callable[[], Callable[[], torch.Tensor]]
    exact: torch.Tensor | None = None


def candidates(n: int, k: int, group: int, rows: int) -> tuple[dict[str, Candidate], dict[str, str]]:
    """(name → candidate, name → why it is absent); all from one weight, rounded by absmax / 7 or by the peer itself."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=g) / k**0.5
    x = torch.randn(rows, k, generator=g)
    half = x.bfloat16()
    grouped = weight.unflatten(1, (-1, group))
    scale = (grouped.abs().amax(-1) / 7).half().float()
    codes4 = (grouped / scale[..., None]).round().clamp(-8, 7).to(torch.int8).flatten(1)
    by_channel = weight.abs().amax(1, keepdim=True) / 127
    codes8 = (weight / by_channel).round().to(torch.int8)
    exact4 = x.double() @ (codes4.double().unflatten(1, (-1, group)) * scale.double()[..., None]).flatten(1).T
    exact8 = x.double() @ (codes8.double() * by_channel.double()).T
    int4 = panels.pack(codes4, scale.half(), bits=4)
    int8 = panels.pack(codes8, by_channel, bits=8)
    found: dict[str, Candidate] = {}
    absent: dict[str, str] = {}

    def laid(p: panels.Panels) -> panels.Panels:
        return panels.Panels(p.codes.clone(), p.scale.clone(), None, p.shape, p.group, p.bits)

    found["float32"] = Candidate(n * k * 4, lambda: partial(linear, x, weight.clone()))
    found["bfloat16"] = Candidate(n * k * 2, lambda: partial(linear, half, weight.bfloat16()))
    if native.why_not() is None:
        by_float, by_int = weight_linear.cpu.weight_linear, int_linear.cpu.int_linear
        found["native int4, float32 inputs"] = Candidate(int4.nbytes, lambda: partial(by_float, x, laid(int4)), exact4)
        found["native int4, bfloat16 inputs"] = Candidate(int4.nbytes, lambda: partial(by_float, half, laid(int4)))
        found["native int4, int8 inputs"] = Candidate(int4.nbytes, lambda: partial(by_int, x, laid(int4)), exact4)
        found["native int8, float32 inputs"] = Candidate(int8.nbytes, lambda: partial(by_float, x, laid(int8)), exact8)
        found["native int8, int8 inputs"] = Candidate(int8.nbytes, lambda: partial(by_int, x, laid(int8)), exact8)
        found["torch _int_mm, int8 inputs"] = Candidate(n * k, lambda: partial(int_mm, x, codes8.clone(), by_channel[:, 0]), exact8)
        prepack = getattr(torch.ops.onednn, "qlinear_prepack", None)
        if prepack is not None:
            found[ONEDNN] = Candidate(n * k, lambda: partial(onednn, x, prepack(codes8.t(), [rows, k]), by_channel[:, 0].contiguous()), exact8)
    if group in (32, 64, 128, 256):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes4.int() + 8, 1)
        both = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().bfloat16()
        mm = torch.ops.aten._weight_int4pack_mm_for_cpu
        found["torch int4, bfloat16 inputs"] = Candidate(n * k // 2 + both.numel() * 2, lambda: partial(mm, half, packed.clone(), group, both))
    else:
        absent["torch int4"] = f"needs groups of 32, 64, 128 or 256, got {group}"
    threads = torch.get_num_threads()
    if (why := layer_onnxruntime.missing()) is not None:
        absent["ONNX Runtime int4"] = why
    else:
        block = layer_onnxruntime.block_of(group, k)
        size = n * k // 2 + n * k // block * 4
        for level, name in ((4, "int8 inputs"), (0, "float32 inputs")):
            found[f"ONNX Runtime int4, {name}"] = Candidate(size, partial(layer_onnxruntime.matmul, codes4, scale, x, level, threads), exact4)
    for kind in layer_ggml.TYPES:
        if (why := layer_ggml.missing(kind, k)) is not None:
            absent[f"ggml {kind}"] = why
            continue
        size = layer_ggml.bytes_of(kind, n, k)
        for repack, name in ((False, f"ggml {kind}"), (True, f"ggml {kind}, laid out anew")):
            found[name] = Candidate(size, partial(layer_ggml.matmul, kind, weight, x, threads, repack=repack))
    return found, absent


ONEDNN = "oneDNN int8, int8 inputs"


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


def copies(found: dict[str, Candidate], rows: int) -> int:
    """Of each weight: so many that between two uses of one, more bytes than the caches hold have been read by all candidates in turn."""
    return max(1, -(-COLD // sum(c.size for c in found.values()))) if rows == 1 else 1


Times = dict[str, list[float]]
Run = Callable[..., Any]


def in_turn(found: dict[str, Candidate], count: int, seconds: float, clock: Callable[[], float]) -> tuple[Times, dict[str, str]]:
    """(milliseconds of each candidate, one call of each after the other; name → why it failed)"""
    working: dict[str, list[Callable[[], Any]]] = {}
    failed = {}
    for name, candidate in found.items():
        try:
            working[name] = [candidate.make() for _ in range(count)]
            working[name][0]()
        except RuntimeError as e:
            failed[name] = str(e).splitlines()[0]
            working.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in working}
    order = random.Random(0)
    started, i = time.perf_counter(), 0
    while i < 9 or time.perf_counter() - started < seconds:
        # in another order each time: what ran before leaves its traces in the caches
        for name, own in order.sample(list(working.items()), len(working)):
            call = own[i % len(own)]
            before = clock()
            call()
            times[name].append(1e3 * (clock() - before))
        i += 1
    return times, failed


def layers(seconds: float, only: str = "", clock: Callable[[], float] = time.perf_counter) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(one record for each shape, number of rows and candidate; candidate → why it is absent, with the shape)"""
    rows, absent = [], {}
    for shape, (n, k, group) in SHAPES.items():
        if only not in shape:
            continue
        for t in ROWS:
            found, missing = candidates(n, k, group, t)
            times, failed = in_turn(found, copies(found, t), seconds, clock)
            absent |= {f"{name}, {shape}": why for name, why in (missing | failed).items()}
            for name, own in times.items():
                ms, cuts = statistics.median(own), statistics.quantiles(own, n=10)
                row = {"shape": shape, "rows": t, "kernel": name, "ms": ms, "p10": cuts[0], "p90": cuts[-1], "runs": len(own)}
                exact = found[name].exact
                if exact is not None:
                    row["error"] = float((found[name].make()().double() - exact).norm() / exact.norm())
                rows.append(row | ({"gb_s": found[name].size / ms / 1e6} if t == 1 else {}))
    return rows, absent


def compiled(model: Any) -> Run:
    """`generate` with `model.forward` compiled and a cache of fixed size, so that two graphs serve all calls; `model.generate` stays as it is.

    The graphs are made at the first calls: about a minute each, half of it g++.
    """
    forward = torch.compile(model.forward)

    def run(*args: Any, **options: Any) -> Any:
        model.forward = forward
        try:
            return model.generate(*args, cache_implementation="static", **options)
        finally:
            del model.forward

    return run


def tokens_per_second(runs: dict[str, Run], new: int = 64, prompt: int = 16, repeat: int = 5) -> dict[str, list[float]]:
    """Of `generate` with its cache, one sequence, greedy, all models in turn."""
    ids = torch.randint(0, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    warm = 2  # calls: the second still compiles, for the sizes that have changed since the first
    for i in range(warm + repeat):
        for name, run in runs.items():
            before = time.perf_counter()
            run(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
            if i >= warm:
                speeds[name].append(new / (time.perf_counter() - before))
    return speeds


def served(uri: str, dtype: torch.dtype, recipe: str | None = None, kernel: str | None = None) -> Any:
    """The model, quantized by the recipe where there is one, ready to run in dtype."""
    from qcore.model import load_source, materialize
    from qcore.modules import QuantizedLinear, serve_in
    from qcore.pipeline import quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    own = load_registry()
    loaded = load_source(uri, own.sources)
    if recipe is None:
        if any(p.is_meta for p in loaded.model.parameters()):
            materialize(loaded.model, "", loaded.reader)
        model = loaded.model
    else:
        model = quantize_model(loaded, load_recipe(recipe, own), [], registry=own).model
    serve_in(model, dtype)
    for module in model.modules() if kernel else ():
        if isinstance(module, QuantizedLinear):
            module.bind([k() for k in own.kernels.values()], dtype=dtype, wish=kernel)
    return model


def generate(uri: str) -> dict[str, dict[str, float]]:
    """Tokens a second, eager and compiled, of a model as floats and with weights in 4 bits (w4a16-rtn: how codes were found changes no speed)."""
    models = {
        "float32": served(uri, torch.float32),
        "bfloat16": served(uri, torch.bfloat16),
        "W4, float32": served(uri, torch.float32, "w4a16-rtn"),
        "W4, bfloat16": served(uri, torch.bfloat16, "w4a16-rtn"),
        "W4, float32, inputs rounded to int8 by wish": served(uri, torch.float32, "w4a16-rtn", "native-int8-by-wish"),
    }
    runs: dict[str, Run] = {name: model.generate for name, model in models.items()}
    torch._dynamo.config.recompile_limit = 8 * len(models)  # it counts all models of one class together, and runs what is above it as it was
    runs |= {f"{name}, compiled": compiled(model) for name, model in models.items()}
    return {name: {"median": statistics.median(v), "least": min(v), "most": max(v)} for name, v in tokens_per_second(runs).items()}


def verdicts(record: dict[str, Any], shape: str) -> list[str]:
    """What the issue of speed comes to for one shape: the share of the bandwidth, and how many times faster than each peer."""
    ms = {(r["kernel"], r["rows"]): r["ms"] for r in record["rows"] if r["shape"] == shape}
    lines = []
    for own in ("native int4, int8 inputs", "native int4, float32 inputs"):
        if (own, 1) not in ms:
            continue
        rate = next(r["gb_s"] for r in record["rows"] if (r["kernel"], r["rows"], r["shape"]) == (own, 1, shape))
        error = next((r["error"] for r in record["rows"] if (r["kernel"], r["rows"], r["shape"]) == (own, 128, shape)), None)
        parts = [f"1 row at {100 * rate / record['read_gb_s']:.0f} % of torch.sum's read and {100 * rate / bandwidth(record):.0f} % of the fastest"]
        for t in (1, 128):
            peers = {name: v for (name, rows), v in ms.items() if rows == t and name.startswith(("torch int4", "ONNX", "ggml"))}
            parts.append(
                f"{t} row{'s' if t > 1 else ''}: " + ", ".join(f"{v / ms[own, t]:.1f}× {name.split(', float')[0]}" for name, v in peers.items())
            )
        if (ONEDNN, 128) in ms:
            onednn, peer = ms[ONEDNN, 128], min(peers.values(), default=float("nan"))
            parts.append(f"128 rows take {ms[own, 128] / onednn:.2f} of oneDNN int8's time, the fastest peer's int4 {peer / onednn:.2f}")
        if error is not None:
            parts.append(f"relative error of the result by the inputs' rounding and the sums {error:.1e}")
        lines += [f"- {own}. " + "; ".join(parts) + "."]
    return lines


def bandwidth(record: dict[str, Any]) -> float:
    """GB/s: the fastest that anything in this run read what no cache held."""
    return max([record["read_gb_s"], *(r["gb_s"] for r in record["rows"] if r["rows"] == 1 and r["shape"].startswith("4096"))])


def table(record: dict[str, Any]) -> str:
    """Markdown: one table a shape, one column a number of rows."""
    m = record["machine"]
    read = ""
    if record["rows"]:
        read = f" torch.sum of cold float32 reads {record['read_gb_s']:.1f} GB/s, the fastest kernel below {bandwidth(record):.1f}."
    lines = [
        "# Kernels",
        "",
        "Made by `python tools/bench/kernels.py --json docs/evidence/kernels.json --table docs/evidence/kernels.md --generate zoo:smollm2-135m`.",
        f"Milliseconds{' that the thread ran' if record.get('clock') == 'thread' else ''}, medians of calls in turn "
        "(10th and 90th percentile: kernels.json); int8 inputs with their rounding.",
        f"{m['processor']} ({m['instructions']}), torch {m['torch']}, {record['threads']} thread(s), load {record['load']}." + read,
        "",
        "Peers: " + ("; ".join(f"{name} {version}" for name, version in record.get("peers", {}).items()) or "none") + ".",
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
        lines += ["", *verdicts(record, shape), ""]
        gone = {name.removesuffix(f", {shape}"): why for name, why in record.get("absent", {}).items() if name.endswith(f", {shape}")}
        if gone:
            lines += ["Absent: " + "; ".join(f"{name} ({why})" for name, why in gone.items()) + ".", ""]
    if "tokens_per_second" in record:
        lines += [
            f"## Tokens a second, {record['model']}",
            "",
            "`generate` with its cache, 16 tokens given, 64 made, one sequence; all in turn. Compiled:",
            '`model.forward = torch.compile(model.forward)` and `cache_implementation="static"`; the minutes of compiling are not counted.',
            "",
            "| | median | least | most |",
            "|---|---|---|---|",
        ]
        lines += [f"| {name} | {v['median']:.1f} | {v['least']:.1f} | {v['most']:.1f} |" for name, v in record["tokens_per_second"].items()] + [""]
    return "\n".join(lines)


def peer_versions() -> dict[str, str]:
    """Of what was found."""
    found = {}
    if layer_onnxruntime.missing() is None:
        found["ONNX Runtime"] = metadata.version("onnxruntime")
    if layer_ggml.missing("Q4_0", 32) is None:
        found["ggml"] = layer_ggml.version()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each shape and number of rows")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--peers", type=Path, action="append", default=[], help="folder of Python packages that bring a peer")
    parser.add_argument("--cpu-time", action="store_true", help="of layers: count the time that the thread ran, as on a machine that others use too")
    parser.add_argument("--generate", metavar="MODEL", help="measure tokens a second too")
    parser.add_argument("--no-layers", action="store_true", help="leave out the layers")
    parser.add_argument("--json", type=Path, help="write here; what is not measured now is kept")
    parser.add_argument("--table", type=Path, help="write the table of all that is in --json here")
    options = parser.parse_args(argv)
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time counts the calling thread alone, so it needs --threads 1")
    clock = time.thread_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    sys.path += [str(p) for p in options.peers]
    record: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {"rows": []}
    record |= {"machine": machine(), "threads": options.threads, "load": round(os.getloadavg()[0], 1)}
    with torch.no_grad():
        if not options.no_layers:
            record |= {"peers": peer_versions(), "read_gb_s": read_bandwidth(0.5), "clock": "thread" if options.cpu_time else "wall"}
            record["rows"], record["absent"] = layers(options.seconds, options.only, clock)
            for name, why in record["absent"].items():
                print(f"absent: {name}: {why}", file=sys.stderr)
        if options.generate:
            record |= {"model": options.generate, "tokens_per_second": generate(options.generate)}
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.table:
        options.table.write_text(table(record))
    if not options.table:
        print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
