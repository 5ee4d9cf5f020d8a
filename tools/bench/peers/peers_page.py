"""docs/evidence/peers.md, from the cells of compare.py."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from math import log10, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from evidence import CELLS, ROOT

PAGE = ROOT / "docs" / "evidence" / "peers.md"
READING = Path(__file__).with_name("reading.md")
PICTURE = PAGE.with_name("peers.svg")
HEAD = "| method | calibration windows | bits per weight | KL to float | ± s.e. | perplexity | top-1 | seconds | CPU seconds | load | peak GB |"
BESIDE = "autoround-50"
OWN_ROWS = ("gptq", "awq", "rtn-clip", "rtn")
TOOLKITS = ("gptqmodel", "llmcompressor", "auto-round", "hqq", "torchao", "torch", "transformers")


def _figures(scores: Mapping[str, float]) -> list[str]:
    return [f"{scores['kl']:.4f}", f"{scores['kl_standard_error']:.4f}", f"{scores['perplexity']:.2f}", f"{scores['top1']:.3f}"]


def _row(cell: Any, kept: Mapping[str, Any], words: str, stale: bool) -> tuple[float, str]:
    run, scores = kept["run"], kept["scores"]
    windows = "–" if "no data" in words or cell.peer == "float" else str(cell.windows)
    cost = ["–"] * 4
    if "seconds" in run:
        cost = [f"{run['seconds']:.1f}", f"{run['cpu_seconds']:.0f}", f"{run['load1']:.1f}", f"{run['peak_rss_mib'] * 2**20 / 1e9:.2f}"]
    columns = [words + (" †" if stale else ""), windows, f"{run['eff_bits']:.2f}", *_figures(scores), *cost]
    return scores["kl"], f"| {' | '.join(columns)} |"


def _own(bits: int) -> list[tuple[float, str]]:
    """qcore's rows out of the cells of tools/bench/evidence.py: the same weights, tokens and scores."""
    rows = []
    for method in OWN_ROWS:
        file = CELLS / "smollm2-135m" / f"w{bits}-{method}-seed0.json"
        if file.is_file():
            kept = json.loads(file.read_text())
            windows = "–" if method.startswith("rtn") else str(kept["cell"]["samples"])
            cost = [f"{kept['seconds']:.1f}", "–", f"{kept['load_average']:.1f}", f"{kept['memory']['peak_bytes'] / 1e9:.2f}"]
            columns = [f"qcore `{method}` ‡", windows, f"{kept['bits']:.2f}", *_figures(kept["scores"]), *cost]
            rows.append((kept["scores"]["kl"], f"| {' | '.join(columns)} |"))
    return rows


def _confirmation(there: Mapping[Any, Mapping[str, Any]], methods: Mapping[str, Any]) -> list[str]:
    """The methods that were scored on windows that nothing was chosen on; each but AutoRound beside AutoRound, window by window."""
    rows = []
    for bits in (4, 3, 2):
        found = {c.method: k["unseen"] for c, k in there.items() if c.bits == bits and "unseen" in k}
        for method, kept in sorted(found.items(), key=lambda kv: kv[1]["kl"]):
            values = kept["kl_windows"]
            columns = [str(bits), methods[method].words, f"{kept['kl']:.4f}", f"{stdev(values) / sqrt(len(values)):.4f}"]
            columns += [f"{kept['perplexity']:.2f}", f"{kept['top1']:.3f}"]
            if method != BESIDE and BESIDE in found:
                apart = [own - other for own, other in zip(values, found[BESIDE]["kl_windows"], strict=True)]
                lower = sum(d < 0 for d in apart)
                columns += [f"{fmean(apart):+.4f} ± {stdev(apart) / sqrt(len(apart)):.4f}", f"{lower} of {len(apart)}"]
            else:
                columns += ["–", "–"]
            rows.append(f"| {' | '.join(columns)} |")
    if not rows:
        return []
    kept = next(k["unseen"] for k in there.values() if "unseen" in k)
    head = "| bits | method | KL to float | ± s.e. | perplexity | top-1 | KL less AutoRound's, ± s.e. | windows in which it is lower |"
    return [
        "## On text that no setting was chosen on",
        "",
        f"The same runs on {len(kept['kl_windows'])} other windows of 512 tokens of the evaluation text, which no choice was made on; 64 calibration",
        f"windows each. Float perplexity {kept['perplexity_reference']:.2f}. Differences are taken window by window.",
        "",
        head,
        "|" + "---|" * (head.count("|") - 1),
        *rows,
        "",
    ]


def _own_threads() -> str:
    files = [CELLS / "smollm2-135m" / f"w{bits}-{method}-seed0.json" for bits in (4, 3, 2) for method in OWN_ROWS]
    return " or ".join(sorted({str(json.loads(f.read_text())["threads"]) for f in files if f.is_file()}))


def _one_line(error: str) -> str:
    return re.sub(r"\s+", " ", error).strip()[:200].replace("|", "\\|")


def _versions(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line an environment."""
    sets: dict[str, list[str]] = {}
    for kept in found:
        versions = kept["run"].get("versions", {})
        line = ", ".join(f"{p} {versions[p]}" for p in TOOLKITS if p in versions)
        if line:
            sets.setdefault(line, []).append(kept["cell"]["peer"])
    return [f"- {', '.join(f'`{p}`' for p in dict.fromkeys(peers))}: {line}" for line, peers in sorted(sets.items(), key=lambda kv: kv[1])]


def _picture(there: Mapping[Any, Mapping[str, Any]]) -> None:
    """KL against the processor's seconds, a panel a width."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qcore"  # the same cells give the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2))
    for axis, bits in zip(axes, (4, 3, 2), strict=True):
        found = [(c, k) for c, k in there.items() if c.bits == bits and "cpu_seconds" in k["run"] and "scores" in k]
        points = sorted((log10(k["scores"]["kl"]), log10(max(k["run"]["cpu_seconds"], 1.0)), c.method, c.peer.startswith("qcore")) for c, k in found)
        high = points[-1][0] - points[0][0]
        below = -1.0  # where the last name was written, as a share of the height: names do not cover one another
        for y, x, name, own in points:
            share = (y - points[0][0]) / high
            below = max(share, below + 0.04)
            axis.plot(10**x, 10**y, "o", color="tab:red" if own else "tab:gray")
            at = 10**x, 10 ** (points[0][0] + below * high)
            axis.annotate(name, at, textcoords="offset points", xytext=(6, -2), fontsize=7, color="tab:red" if own else "black")
        axis.set(title=f"{bits} bits, groups of 64", xlabel="processor seconds, one thread", xscale="log", yscale="log")
        axis.margins(x=0.3, y=0.12)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL divergence to the float model")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
    pyplot.close(figure)


def page(cells: Sequence[Any], methods: Mapping[str, Any], fresh: Callable[[Any, dict[str, Any]], bool]) -> str:
    """Tables by width, each by KL; what failed; what is not measured."""
    there = {c: json.loads(c.file.read_text()) for c in cells if c.file.exists()}
    if len(tokens := {kept["tokens"] for kept in there.values()}) > 1:
        raise SystemExit(f"cells of different evaluation tokens: {sorted(tokens)}; remove those of the older text")
    threads = sorted({kept["run"]["threads"] for kept in there.values() if "threads" in kept["run"]})
    lines = [
        "# qcore beside other toolkits",
        "",
        "`python tools/bench/peers/compare.py` made this page; one JSON file a cell lies in `cells/peers/`.",
        "`zoo:smollm2-135m` as float32 weights; calibration windows of 512 tokens of news, the same ones for all; weights alone, groups of 64,",
        "embeddings and head untouched. Each toolkit quantizes in an environment of its own (`tools/bench/peers/requirements-*.txt`) and hands back",
        "dequantized float32 weights; one evaluator, qcore's, scores all of them on 24 windows of 512 tokens of other news, against the float model,",
        "over the whole vocabulary. Symmetric integers unless a row says otherwise; bits count 16-bit scales and zero points.",
        "",
        f"Seconds and peak memory (resident, libraries included) are of the quantization call alone, threads: {', '.join(map(str, threads)) or '–'};",
        "the runs follow one another, width by width. Load is the machine's when the call began: above the threads, other work ran beside, and only",
        "the CPU seconds compare. ‡: the cell of `tools/bench/evidence.py` on the same data; its KL is of the checkpoint as written, its seconds of",
        f"{_own_threads()} threads.",
        "",
        "**The weights are dequantized Q4_1: they lie on an asymmetric 4-bit grid in groups of 32, which favours asymmetric and unrotated 4 bits.**",
        "",
        "![KL divergence against processor seconds, by width](peers.svg)",
        "",
    ]
    for bits in (4, 3, 2):
        rows = [_row(c, k, methods[c.method].words, not fresh(c, k)) for c, k in there.items() if c.bits == bits and k["run"]["ok"]]
        rows += _own(bits)
        failed = [(c, k) for c, k in there.items() if c.bits == bits and not k["run"]["ok"]]
        absent = [c for c in cells if c.bits == bits and c not in there]
        lines += [f"## {bits} bits", "", HEAD, "|" + "---|" * (HEAD.count("|") - 1), *[text for _, text in sorted(rows)], ""]
        lines += [f"- {methods[c.method].words}: **failed**, `{_one_line(k['run']['error'])}`" for c, k in failed]
        lines += ["Not measured: " + ", ".join(f"`{c.name}`" for c in absent) + ".", ""] if absent else [""] if failed else []
    lines += _confirmation(there, methods)
    if any(not fresh(c, k) for c, k in there.items()):
        lines += ["† made by older code; the script computes it anew.", ""]
    if versions := _versions(list(there.values())):
        lines += ["## Versions", "", *versions, ""]
    if READING.is_file():
        lines += [READING.read_text(encoding="utf-8").rstrip(), ""]
    return "\n".join(lines)


def write(cells: Sequence[Any], methods: Mapping[str, Any], fresh: Callable[[Any, dict[str, Any]], bool]) -> None:
    PAGE.write_text(page(cells, methods, fresh), encoding="utf-8")
    _picture({c: json.loads(c.file.read_text()) for c in cells if c.file.exists()})
