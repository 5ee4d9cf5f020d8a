"""The evidence for the prefetch simulator: models, depths, units and workloads; docs/evidence/nvr.{json,md,svg}.

    python tools/bench/evidence_nvr.py            run what is missing, then write the page and the picture
    python tools/bench/evidence_nvr.py --table    write the page from what is there

About 70 processor seconds on one core, and 10 more where the traces of our own models (nvr_traces.py) are not in the cache.  Everything is
simulated, so the same code gives the same figures on every machine; a part made by other code runs again.  Only the seconds are measured.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from evidence import CACHE, ROOT, code_hash
from qplug_hardware.nvr.config import CacheShape, Machine, Runahead, Settings
from qplug_hardware.nvr.files import read_trace, save_trace
from qplug_hardware.nvr.metrics import Result
from qplug_hardware.nvr.models import MODELS, compare, simulate
from qplug_hardware.nvr.plot import depth_plot
from qplug_hardware.nvr.run import sweep
from qplug_hardware.nvr.synth import permutation, short_rows, streaming, two_level, uniform, zipf
from qplug_hardware.nvr.trace import Trace
from qplug_hardware.nvr.workloads import csr, kv_pages, moe_routing, neighbours, point_cloud, power_law_graph

PAGE = ROOT / "docs" / "evidence" / "nvr.md"
DATA = PAGE.with_suffix(".json")
READING = ROOT / "tools" / "bench" / "nvr_reading.md"
DEPTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
# a toy model of 60 lines that was written before this one: depth → (demand misses avoided, speedup)
TOY = {16: (0.999, 1.94), 32: (0.998, 2.81), 64: (0.998, 3.94), 128: (0.996, 4.07), 256: (0.992, 3.87), 512: (0.984, 3.52)}
UNITS = ("sd", "scd", "lbd", "vmig")
KEPT = ("cycles", "speedup", "coverage", "coverage_with_late", "accuracy", "timeliness", "offchip_bytes", "bus_bound", "data_miss_rate")


def reference() -> Trace:
    return zipf(20_000, 40_000)


def graph() -> Trace:
    """3,000 sampled nodes of a power-law graph of 20,000, visited in random order."""
    import numpy as np

    row_ptr, col_idx = power_law_graph(20_000, 120_000, seed=0)
    return csr(row_ptr, col_idx, 20_000, 128, order=np.random.default_rng(0).permutation(20_000)[:3000], name="graph").head(12_000)


def experts() -> Trace:
    """Two of 64 experts for each of 6,000 tokens, experts chosen evenly: expert by expert, tokens are in order."""
    import numpy as np

    return moe_routing(np.argsort(np.random.default_rng(0).random((6000, 64)), axis=1)[:, :2], 64, 256, name="experts")


def pages() -> Trace:
    """384 queries, each reads 32 of 4,096 pages of a cache through a block table; nearby queries like the same pages."""
    import numpy as np

    rng = np.random.default_rng(0)
    popular = rng.permutation(4096)
    chosen = np.stack([np.sort(popular[(rng.integers(0, 600, size=32) + 8 * q) % 4096]) for q in range(384)])
    return kv_pages(chosen, rng.permutation(8192)[:4096], 8192, 256, name="kv pages")


def own(name: str) -> Trace:
    """A trace of one of our quantized models, kept in the cache."""
    file = CACHE / "nvr" / f"{name}.npz"
    if not file.exists():
        from nvr_traces import kv_trace, moe_trace

        file.parent.mkdir(parents=True, exist_ok=True)
        save_trace(file, moe_trace() if name == "moe" else kv_trace())
    return read_trace(file)


SMALL_L2 = Settings(machine=Machine(l2=CacheShape(size=64 << 10, ways=8, latency=20)))
# name → (trace, settings, what it is)
WORKLOADS: dict[str, tuple[Callable[[], Trace], Settings, str]] = {
    "streaming": (lambda: streaming(20_000, 12_000), Settings(), "rows in order"),
    "permutation": (lambda: permutation(20_000, 12_000), Settings(), "every row once, in random order"),
    "uniform": (lambda: uniform(20_000, 12_000), Settings(), "random rows"),
    "two-level": (lambda: two_level(20_000, 12_000), Settings(), "index → table → row, random"),
    "short-rows": (lambda: short_rows(20_000, 12_000), Settings(), "loops of 1 to 12, scattered in memory"),
    "graph": (graph, Settings(), "3,000 sampled nodes of a power-law graph"),
    "point cloud": (lambda: neighbours(point_cloud(1500, 8, 0), 1500, 512), Settings(), "8 nearest neighbours of 1,500 points, a map with holes"),
    "experts": (experts, Settings(), "tokens of 64 experts, routed at random"),
    "kv pages": (pages, Settings(), "32 pages a query through a block table"),
    "tiny-moe": (lambda: own("moe"), Settings(), "routing of `zoo:tiny-moe` at 4 bits, second layer"),
    "tiny-llama kv": (lambda: own("kv"), SMALL_L2, "32 keys a query, `zoo:tiny-llama` at 4 bits; L2 of 64 KB"),
}


def kept(result: Result) -> dict[str, Any]:
    return {k: getattr(result, k) for k in KEPT} | {"area": result.area["sum"], "rows": result.by_stage["rows"]}


def part_reference() -> dict[str, Any]:
    trace = reference()
    seconds = {}
    for model in MODELS:
        started = time.process_time()
        simulate(trace, model)
        seconds[model] = round(time.process_time() - started, 2)
    return {"trace": trace.summary(), "models": {m: kept(r) for m, r in compare(trace, MODELS).items()}, "seconds": seconds}


def part_depths() -> dict[str, Any]:
    swept = sweep(reference(), ["imp", "dvr", "nvr", "nvr-nsb"], DEPTHS, Settings())
    return {m: {str(d): kept(r) for d, r in c.items()} for m, c in swept.items()}


def part_workloads() -> dict[str, Any]:
    out = {}
    for name, (make, settings, _) in WORKLOADS.items():
        trace = make()
        out[name] = {"trace": trace.summary(), "models": {m: kept(r) for m, r in compare(trace, MODELS, settings).items()}}
    return out


def part_units() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in ("zipf", "two-level", "short-rows", "graph"):
        trace = reference().head(12_000) if name == "zipf" else WORKLOADS[name][0]()
        found = {"whole": compare(trace, ["nvr"])["nvr"], "with NSB": compare(trace, ["nvr-nsb"])["nvr-nsb"]}
        for unit in UNITS:
            found[f"no {unit.upper()}"] = compare(trace, ["nvr"], Settings(runahead=replace(Runahead(), **{unit: False})))["nvr"]
        out[name] = {k: kept(r) for k, r in found.items()}
    return out


def part_nsb() -> dict[str, Any]:
    """16 KB as a speculative buffer, or as more L2."""
    out = {}
    larger = Settings(machine=Machine(l2=CacheShape(size=272 << 10, ways=8, latency=20)))
    for name, trace in (("zipf", reference()), ("graph", graph())):
        base = compare(trace, ["nvr"])["nvr"]
        out[name] = {
            "NVR": kept(base),
            "and 16 KB of L2": kept(compare(trace, ["nvr"], larger)["nvr"]),
            "and 16 KB of NSB": kept(compare(trace, ["nvr-nsb"])["nvr-nsb"]),
        }
    return out


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "reference": part_reference,
    "depths": part_depths,
    "units": part_units,
    "nsb": part_nsb,
    "workloads": part_workloads,
}


def code() -> str:
    files = sorted(f.relative_to(ROOT).as_posix() for f in (ROOT / "packages/qplug-hardware/src/qplug_hardware/nvr").glob("*.py"))
    return code_hash([f for f in files if f.rpartition("/")[2] not in ("commands.py", "run.py", "plot.py")])


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".replace("%", " %")


def models_table(models: dict[str, Any], names: tuple[str, ...] = MODELS) -> list[str]:
    lines = ["| model | speedup | covered | late | accuracy | timely | off-chip MB | tables kbit |", "|---|---|---|---|---|---|---|---|"]
    for m in names:
        r = models[m]
        lines.append(
            f"| `{m}` | {r['speedup']:.2f} | {share(r['coverage'])} | {share(r['coverage_with_late'] - r['coverage'])} | {share(r['accuracy'])} | "
            f"{share(r['timeliness'])} | {r['offchip_bytes'] / 1e6:.3f} | {r['area'] / 1000:.1f} |"
        )
    return lines


def page(parts: dict[str, Any]) -> str:
    ref, depths, nvr = parts["reference"], parts["depths"], parts["depths"]["nvr"]
    base = ref["models"]["none"]
    lines = [
        "# Prefetching for sparse NPUs, simulated",
        "",
        "`python tools/bench/evidence_nvr.py` made this page and [its figures](nvr.json). What the models are: [docs/nvr.md](../nvr.md).",
        "Defaults: lines of 64 bytes, L2 of 256 KB, DRAM 200 cycles and 8 cycles of bus a line, vectors of 16, 32 MSHRs, depth 128; rows of 128",
        "bytes; seed 0.",
        "",
        "**The paper's figures come from a simulator that its authors calibrated with their RTL. A trace model cannot reproduce them, and nothing",
        "here claims to: shapes are compared, no magnitudes.**",
        "",
        "## The reference: Zipf(1.2), 20,000 rows of 128 bytes, 40,000 gathers",
        "",
        f"Miss rate of the rows' lines without prefetching: {base['data_miss_rate']:.3f}. A toy model of 60 lines, written before this one,",
        "had .243; how it drew its rows, whether lanes that want the same line counted once (as here) and whether it loaded indices is not recorded.",
        "Here indices are loaded before the rows, and miss once a vector without prefetching, so there is more to gain.",
        "",
        *models_table(ref["models"]),
        "",
        "`oracle` is a bound, not a machine. Processor seconds of a run, one core: " + ", ".join(f"{m} {s}" for m, s in ref["seconds"].items()) + ".",
        "",
        "### Depth",
        "",
        "Misses avoided count late prefetches as avoided, as the toy model does; covered does not.",
        "",
        "| depth | toy: misses avoided | toy: speedup | misses avoided | covered | speedup | `imp` | `dvr` | `nvr-nsb` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for d in DEPTHS:
        toy = TOY.get(d)
        said = f"{toy[0]:.3f} | {toy[1]:.2f}" if toy else "– | –"
        r = nvr[str(d)]
        rest = " | ".join(f"{depths[m][str(d)]['speedup']:.2f}" for m in ("imp", "dvr", "nvr-nsb"))
        lines.append(f"| {d} | {said} | {r['coverage_with_late']:.3f} | {r['coverage']:.3f} | {r['speedup']:.2f} | {rest} |")
    lines += ["", "![speedup against depth](nvr.svg)", "", "## Units", "", "NVR without one of its units, or with the speculative buffer.", ""]
    lines += ["| trace | | speedup | covered | late | accuracy | off-chip MB |", "|---|---|---|---|---|---|---|"]
    for name, found in parts["units"].items():
        for label, r in found.items():
            late = share(r["coverage_with_late"] - r["coverage"])
            rest = f"{share(r['coverage'])} | {late} | {share(r['accuracy'])} | {r['offchip_bytes'] / 1e6:.3f}"
            lines.append(f"| {name} | {label} | {r['speedup']:.2f} | {rest} |")
    lines += ["", "### 16 KB more: buffer or cache", "", "| trace | | cycles | speedup | off-chip MB |", "|---|---|---|---|---|"]
    for name, found in parts["nsb"].items():
        lines += [f"| {name} | {label} | {r['cycles']} | {r['speedup']:.2f} | {r['offchip_bytes'] / 1e6:.3f} |" for label, r in found.items()]
    lines += [
        "",
        "## Workloads",
        "",
        "Speedup over no prefetching. The last columns are NVR's: the share of its time in which the bus was busy, and its",
    ]
    lines += ["traffic over the least possible (Belady's rule). Traces of our own models: `tools/bench/nvr_traces.py`.", ""]
    lines += ["| workload | | gathers | " + " | ".join(f"`{m}`" for m in MODELS[1:]) + " | bus | traffic |", "|---" * (5 + len(MODELS[1:])) + "|"]
    for name, w in parts["workloads"].items():
        r, least = w["models"]["nvr"], w["models"]["oracle"]["offchip_bytes"]
        cells = " | ".join(f"{w['models'][m]['speedup']:.2f}" for m in MODELS[1:])
        last = f"{share(r['bus_bound'] / r['cycles'])} | {r['offchip_bytes'] / least:.2f}"
        lines.append(f"| {name} | {WORKLOADS[name][2]} | {w['trace']['gathers']} | {cells} | {last} |")
    return "\n".join([*lines, "", READING.read_text(encoding="utf-8").rstrip(), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    there = json.loads(DATA.read_text()) if DATA.exists() else {}
    parts = there.get("parts", {}) if args.table or there.get("code") == code() else {}
    for name, make in PARTS.items():
        if name not in parts and not args.table:
            parts[name] = make()
            DATA.write_text(json.dumps({"code": code(), "parts": parts}, indent=1) + "\n")
            print(f"{name}: done", flush=True)
    curves = {m: [c[str(d)]["speedup"] for d in DEPTHS] for m, c in parts["depths"].items()}
    flat = {m: parts["reference"]["models"][m]["speedup"] for m in ("none", "next-line", "stream", "oracle")}
    PAGE.with_suffix(".svg").write_text(depth_plot(DEPTHS, curves, flat, "Zipf(1.2)"), encoding="utf-8")
    PAGE.write_text(page(parts), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}, nvr.json, nvr.svg")


if __name__ == "__main__":
    main()
