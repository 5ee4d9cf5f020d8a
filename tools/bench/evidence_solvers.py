"""The evidence for solvers and mixed precision at 2 and 3 bits, one JSON file a cell.

    python tools/bench/evidence_solvers.py                compute the cells that are missing, then docs/evidence/solvers.md
    python tools/bench/evidence_solvers.py --list         say which are missing, and compute nothing
    python tools/bench/evidence_solvers.py --only w2      only cells whose name contains the word
    python tools/bench/evidence_solvers.py --minutes 3    as many as begin within that time: a cell takes 5 s to 4 minutes on one core
    python tools/bench/evidence_solvers.py --table        write the page from the cells that are there

As `evidence.py`: the same key, the same measurement (quantize, save, load again, compare with the float model), all in one process.  tiny-llama: 64
windows of 256 tokens of calibration text, drawn by the seed, and 64 of evaluation text.  smollm2-135m: news text, 64 and 24 windows of 512.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
from cells import compute
from evidence import ROOT, Cell

SEEDS = 3
PAGE = ROOT / "docs" / "evidence" / "solvers.md"
_WIDE = "rules.0.granularity.size=32"
_VECTORS = ("rules.0.format.bits=8", "rules.0.format.dim=4", "rules.0.granularity.rows=128", "rules.0.granularity.cols=256")

# label → (recipe, overrides, what it is); {b} is the width
METHODS = {
    "rtn-clip": ("w4a16-rtn", ('solver.clip="mse"', "rules.0.format.bits={b}"), "nearest rounding, searched ranges; no data"),
    "hqq": ("w2a16-hqq", ("rules.0.format.bits={b}",), "HQQ: float offsets, no data"),
    "gptq": ("w{b}a16-gptq", (), "GPTQ, the baseline"),
    "gptq-offset": ("w{b}a16-gptq", ("rules.0.offset=value",), "GPTQ with float offsets, as many bits as HQQ"),
    "gptq-g32": ("w{b}a16-gptq", (_WIDE,), "GPTQ in groups of 32"),
    "lowrank": ("w2a16-lowrank", ("rules.0.format.bits={b}",), "GPTQ and an 8-bit correction of rank 8"),
    "lwc": ("w3a16-lwc", ("rules.0.format.bits={b}",), "learned clipping, nearest rounding"),
    "adaround-layers": ("w{b}a16-gptq", ("solver.name=adaround",), "AdaRound layer by layer, from nearest rounding"),
    "adaround": ("w2a16-adaround", ("rules.0.format.bits={b}",), "GPTQ, then AdaRound over blocks"),
    "signround": ("w2a16-signround", ("rules.0.format.bits={b}",), "GPTQ, then SignRound over blocks"),
    "gptvq-1d": (
        "w2a16-gptvq",
        ("rules.0.format.bits={b}", "rules.0.format.dim=1", "rules.0.granularity.rows=2"),
        "GPTVQ of single weights, tiles of 128",
    ),
    "gptvq-2d": ("w2a16-gptvq", (), "GPTVQ of pairs, tiles of 1024"),
    "gptvq-4d": ("w2a16-gptvq", _VECTORS, "GPTVQ of vectors of 4, tiles of 32768"),
}
# label → (recipe, overrides, what it is): recipes of neighbouring methods, beside the same setting without their idea
NEIGHBOURS = {
    "w8a8-static": ("spike-aware-w8a8", ("allocator.limit=1e9",), "8-bit weights per channel, static 8-bit inputs per tensor, nearest"),
    "spike-aware-w8a8": ("spike-aware-w8a8", (), "… and FP8 where activation spikes stand out"),
    "w4a8-channel": ("rtn-w4a8", ('rules.0.granularity="channel"',), "4-bit weights per channel, dynamic 8-bit inputs per token, nearest"),
    "qllm-w4a8": ("qllm-w4a8", (), "… channels reassembled, low-rank tuning (QLLM)"),
    "mobilequant-w4a8": ("mobilequant-w4a8", (), "all scales static: scales, clipping, ranges learned (MobileQuant)"),
    "zeroquant-fp-w4a8": ("zeroquant-fp-w4a8", (), "FP4 in groups of 64 under powers of two by GPTQ, FP8 inputs (ZeroQuant-FP)"),
    "w2a16-pbllm": ("w2a16-pbllm", (), "1-bit weights, a tenth of them in 8 bits (PB-LLM)"),
}
_ON_SMOLLM2 = ("w8a8-static", "spike-aware-w8a8")  # whose input spikes are real; the learned ones take half an hour there
_AT_2_ONLY = ("gptvq-2d", "gptvq-4d")
_ONE_SEED = ("rtn-clip", "hqq", "lwc", "adaround", "adaround-layers", "gptvq-4d")  # no data, or minutes a cell
_BUDGETS = (3.0, 3.25, 3.5)
_METRICS = ("mse", "output", "fisher", "taylor", "hessian-trace", "cca", "pruning", "spikes")


def matrix() -> list[Cell]:
    """What is measured, the first seed of everything first."""
    tiny = {"length": 256, "windows": 64, "window": 256, "text": "own"}
    cells = []
    for seed in range(SEEDS):
        for bits in (2, 3):
            for label, (recipe, extra, _) in METHODS.items():
                if (bits == 3 and label in _AT_2_ONLY) or (seed and label in _ONE_SEED):
                    continue
                overrides = tuple(o.format(b=bits) for o in extra)
                cells.append(Cell("tiny-llama", f"solvers-w{bits}-{label}", recipe.format(b=bits), overrides, seed=seed, **tiny))  # type: ignore[arg-type]
        for budget in _BUDGETS:
            cells.append(Cell("tiny-llama", f"mixed-{budget}-kl", "mixed", (f"allocator.bits={budget}",), seed=seed, **tiny))  # type: ignore[arg-type]
        if not seed:
            for metric in _METRICS:
                cells.append(Cell("tiny-llama", f"mixed-3.25-{metric}", "mixed", ("allocator.bits=3.25", f"allocator.metric={metric}"), **tiny))  # type: ignore[arg-type]
            for choose in ("greedy", "prefix"):
                cells.append(Cell("tiny-llama", f"mixed-3.25-kl-{choose}", "mixed", ("allocator.bits=3.25", f"allocator.choose={choose}"), **tiny))  # type: ignore[arg-type]
    for label, (recipe, extra, _) in NEIGHBOURS.items():
        cells.append(Cell("tiny-llama", f"neighbours-{label}", recipe, extra, **tiny))  # type: ignore[arg-type]
    cells += [Cell("smollm2-135m", f"neighbours-{label}", NEIGHBOURS[label][0], NEIGHBOURS[label][1]) for label in _ON_SMOLLM2]
    # GPTQ beside it is evidence.py's cell, SignRound is among the other toolkits (peers/compare.py)
    return [*cells, Cell("smollm2-135m", "solvers-w2-gptvq-2d", "w2a16-gptvq")]


def page(cells: Sequence[Cell]) -> str:
    """The tables, from the cells that are there."""
    there = {(c.model, c.label): [] for c in cells}  # type: dict[tuple[str, str], list[dict[str, Any]]]
    for c in cells:
        if c.file.exists():
            there[(c.model, c.label)].append(json.loads(c.file.read_text()))
    some = next((own[0] for (model, _), own in there.items() if own and model == "tiny-llama"), None)
    lines = [
        "# Solvers at 2 and 3 bits, and mixed precision",
        "",
        "`python tools/bench/evidence_solvers.py` made this page; one JSON file a cell lies in `cells/`.",
        "KL is to the float model, over the whole vocabulary, on text that was held out of calibration. Bits are packed bytes, scales and books",
        "included. Means over seeds (of the calibration windows), ± their standard deviation; one seed where there is no ±. Seconds are of one core",
        "of a machine with other work beside: orders of magnitude. A † marks cells of older code.",
        "",
    ]
    for bits in (2, 3):
        base = there[("tiny-llama", f"solvers-w{bits}-gptq")]
        rows = [
            (label, words, there[("tiny-llama", f"solvers-w{bits}-{label}")])
            for label, (*_, words) in METHODS.items()
            if ("tiny-llama", f"solvers-w{bits}-{label}") in there
        ]
        if known := [row for row in rows if row[2]]:
            lines += [f"## tiny-llama, {bits} bits", "", *_table(known, base), ""]
    if some is not None:
        lines += ["![KL divergence against size](solvers.svg)", ""]
    uniform = [("uniform, w3 GPTQ", "3 bits everywhere", there[("tiny-llama", "solvers-w3-gptq")])]
    mixed = [
        (f"mixed {budget}", "2, 3, 4 or 6 bits; KL by substitution, knapsack", there[("tiny-llama", f"mixed-{budget}-kl")]) for budget in _BUDGETS
    ]
    metrics = [(f"mixed 3.25, {m}", "the same budget by another metric", there[("tiny-llama", f"mixed-3.25-{m}")]) for m in _METRICS]
    ways = [(f"mixed 3.25, {w}", "KL, another way to choose", there[("tiny-llama", f"mixed-3.25-kl-{w}")]) for w in ("greedy", "prefix")]
    known = [row for row in (*uniform, *mixed, *metrics, *ways) if row[2]]
    if known:
        lines += ["## tiny-llama, mixed precision", "", *_table(known, there[("tiny-llama", "solvers-w3-gptq")]), ""]
    if some is not None:
        lines += [f"Float perplexity of tiny-llama: {some['scores']['perplexity_reference']:.2f}.", ""]
    for model in ("tiny-llama", "smollm2-135m"):
        known = [
            (label, words, there[(model, f"neighbours-{label}")])
            for label, (*_, words) in NEIGHBOURS.items()
            if there.get((model, f"neighbours-{label}"))
        ]
        if known:
            lines += [f"## {model}, recipes of neighbouring methods", "", *_table(known, []), ""]
    large = [
        (label.removeprefix("solvers-"), "", own)
        for (model, label), own in there.items()
        if model == "smollm2-135m" and label.startswith("solvers") and own
    ]
    if large:
        gptq = [json.loads(f.read_text()) for f in (evidence.CELLS / "smollm2-135m").glob("w2-gptq-seed0.json")]
        rows = [*([("w2-gptq", "of `tools/bench/evidence.py`", gptq)] if gptq else []), *large]
        lines += ["## smollm2-135m, 2 bits", "", *_table(rows, gptq), ""]
        lines += [
            f"Float perplexity: {large[0][2][0]['scores']['perplexity_reference']:.2f}. Weights are dequantized Q4_1. "
            "SignRound on this model, at 4, 3 and",
            "2 bits and beside AutoRound: [other toolkits](peers.md).",
            "",
        ]
    reading = Path(__file__).with_name("solvers_reading.md")
    if reading.exists():
        lines += [reading.read_text(encoding="utf-8").strip(), ""]
    return "\n".join(lines)


def picture(cells: Sequence[Cell]) -> None:
    """solvers.svg: KL divergence against size on tiny-llama, weights alone; the Pareto front is joined."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qcore"  # the same cells give the same bytes
    from matplotlib import pyplot

    found: dict[str, list[tuple[float, float]]] = {}
    for c in cells:
        if c.model == "tiny-llama" and c.label.startswith(("solvers", "mixed")) and c.file.exists():
            kept = json.loads(c.file.read_text())
            found.setdefault(c.label.removeprefix("solvers-"), []).append((kept["bits"], kept["scores"]["kl"]))
    points = {label: (own[0][0], mean(kl for _, kl in own)) for label, own in found.items()}
    if not points:
        return
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for kind, marker in (("w2", "o"), ("w3", "s"), ("mixed", "^")):
        own = [p for label, p in points.items() if label.startswith(kind)]
        axes.scatter(
            [p[0] for p in own], [p[1] for p in own], marker=marker, label={"w2": "2 bits", "w3": "3 bits", "mixed": "mixed precision"}[kind]
        )
    for label, (bits, kl) in points.items():
        axes.annotate(label, (bits, kl), xytext=(4, 3), textcoords="offset points", fontsize=6)
    front = sorted(p for p in points.values() if not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points.values()))
    axes.plot([p[0] for p in front], [p[1] for p in front], color="grey", linewidth=0.8, label="Pareto front")
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per quantized weight")
    axes.set_ylabel("KL divergence to float")
    axes.legend()
    figure.savefig(PAGE.with_suffix(".svg"), metadata={"Date": None})


def _table(rows: Sequence[tuple[str, str, list[dict[str, Any]]]], base: list[dict[str, Any]]) -> list[str]:
    lines = ["| | | bits | KL | against GPTQ | perplexity | top-1 | seeds | seconds |", "|---|---|---|---|---|---|---|---|---|"]
    for label, words, own in rows:
        seeds = {o["cell"]["seed"] for o in own}
        same = [b["scores"]["kl"] for b in base if b["cell"]["seed"] in seeds]
        change = f"{mean(o['scores']['kl'] for o in own) / mean(same) - 1:+.0%}" if len(same) == len(own) and same else "–"
        old = "" if all(evidence.fresh(o) for o in own) else " †"
        scores = (_spread(own, "kl", 4), change, _spread(own, "perplexity", 2), _spread(own, "top1", 3))
        lines.append(f"| {label}{old} | {words} | {own[0]['bits']:.3f} | {' | '.join(scores)} | {len(own)} | {mean(o['seconds'] for o in own):.0f} |")
    return lines


def _spread(own: Sequence[dict[str, Any]], score: str, digits: int) -> str:
    values = [o["scores"][score] for o in own]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> int:
    def said(result: dict[str, Any]) -> str:
        return f"KL {result['scores']['kl']:.4f} bits {result['bits']:.3f}"

    def finish(cells: Sequence[Cell]) -> None:
        PAGE.write_text(page(cells), encoding="utf-8")
        picture(cells)

    return compute(__doc__, matrix(), evidence.measure, said, finish)


if __name__ == "__main__":
    raise SystemExit(main())
