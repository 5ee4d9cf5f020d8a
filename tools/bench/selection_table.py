"""docs/evidence/selection.md and its picture, from the cells of selection.py."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

NAMES = {
    "bbc": "BBC news, 5 classes",
    "rotten-tomatoes": "Rotten Tomatoes, 2 classes",
    "20newsgroups": "20 Newsgroups, 20 classes",
    "reuters-r8": "Reuters R8, 8 classes, one of them half of it",
}


def _cells(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(f.read_text()) for f in sorted((folder / kind).glob("*.json"))]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def _accuracy(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## What the examples are worth",
        "",
        "A pool (3,000 texts; 1,180 of BBC's 1,475) and 256 test texts are drawn by each of five seeds. The selector sees the pool's",
        "embeddings (MiniLM) and chooses 18 or 100 texts, which then get their labels. A test text gets the label of the most similar one",
        "(1-NN, cosine). Mean and standard deviation over seeds. *covers*: mean similarity of a pool text to its nearest chosen one.",
        "*classes*: that have an example.",
        "",
    ]
    for what, title in NAMES.items():
        rows = [c for c in cells if c["cell"]["what"] == what]
        if not rows:
            continue
        lines += [f"### {title}", "", "| | accuracy, 18 | accuracy, 100 | covers, 18 | covers, 100 | classes, 18 |", "|---|---|---|---|---|---|"]

        def of(cell: dict[str, Any], budget: int, key: str) -> list[float]:
            return [r["accuracy"]["1"] if key == "accuracy" else r[key] for r in cell["runs"] if r["budget"] == budget]

        for c in sorted(rows, key=lambda c: -mean(of(c, 18, "accuracy")) - mean(of(c, 100, "accuracy"))):
            right = " | ".join(_spread(of(c, budget, "accuracy")) for budget in (18, 100))
            covers = " | ".join(f"{mean(of(c, budget, 'nearest')):.3f}" for budget in (18, 100))
            lines.append(f"| {c['cell']['selector']} | {right} | {covers} | {mean(of(c, 18, 'classes')):.1f} |")
        lines.append("")
    return lines


def _times(cells: list[dict[str, Any]]) -> list[str]:
    sizes = sorted({int(c["cell"]["what"]) for c in cells})
    names = sorted({c["cell"]["selector"] for c in cells}, key=lambda s: (s not in ("subsa", "subsa-auto"), s))
    found = {(c["cell"]["selector"], int(c["cell"]["what"])): c for c in cells}
    if not sizes:
        return []
    lines = [
        "## Time and memory",
        "",
        "100 texts out of n embeddings of 384 dimensions (float32, in a .npy file of 200 clusters of very different weight, warm in the page",
        f"cache), each in a process of its own, threads: {max(c['threads'] for c in cells)}. Processor seconds of the whole process;",
        "in brackets the seconds that passed from opening the file to the last choice, while other work shared the machine; peak resident",
        "memory (VmHWM) of the whole process, Python and numpy included.",
        "",
        "| | " + " | ".join(f"{n:,}" for n in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name in names:
        row = []
        for n in sizes:
            c = found.get((name, n))
            row.append(f"{c['cpu_seconds']:.3g} s ({c['seconds']:.3g}), {c['peak_bytes'] / 1e6:.0f} MB" if c else "–")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    load = max(c["load_average"] for c in cells)
    told = f"Largest load average at the end of a run: {load:.1f} on two cores."
    return [*lines, "", told, "", "![time against n](selection.svg)", ""]


def _storage(cells: list[dict[str, Any]]) -> list[str]:
    if not cells:
        return []
    sets = [s for s in NAMES if any(c["cell"]["what"] == s for c in cells)]
    found = {(c["cell"]["selector"], c["cell"]["what"]): c for c in cells}
    lines = [
        "## Embeddings in fewer bytes",
        "",
        "Recall@10 against float32 and, in brackets, 5-NN accuracy; 600 queries, up to 4,000 stored texts. Ranges and directions are fitted on the",
        "stored texts, queries stay float.",
        "",
        "| | bytes | " + " | ".join(sets) + " |",
        "|---" * (len(sets) + 2) + "|",
    ]
    for form in sorted({f for f, _ in found}, key=lambda f: (-found[f, sets[0]]["bytes"], -found[f, sets[0]]["recall"]["10"])):
        row = [f"{found[form, s]['recall']['10']:.3f} ({found[form, s]['accuracy']:.3f})" for s in sets]
        lines.append(f"| {form} | {found[form, sets[0]]['bytes']} | " + " | ".join(row) + " |")
    return [*lines, ""]


def _models(folder: Path) -> list[str]:
    lines: list[str] = []
    if encoder := _cells(folder, "encoder"):
        first = encoder[0]
        lines += [
            "## The embedding model quantized by qcore",
            "",
            f"MiniLM, linears alone (embedding tables stay float), {first['pool']} texts and {first['queries']} queries of Rotten Tomatoes,",
            "calibrated on 128 other texts. *covers*: of 100 texts that Sub-SA (auto) chooses by these vectors, in the float model's space; a",
            f"random choice covers {first['covers_random']:.3f}.",
            "",
            "| recipe | bits | cosine to float | recall@10 | 5-NN accuracy | same choices as float, of 100 | covers |",
            "|---|---|---|---|---|---|---|",
        ]
        for c in sorted(encoder, key=lambda c: -c["bits"]):
            values = (
                f"{c['cosine_to_float']:.4f} | {c['recall_at_10']:.3f} | {c['accuracy_5nn']:.3f} | {c['same_choices_of_100']} | {c['covers']:.3f}"
            )
            lines.append(f"| {c['cell']['selector']} | {c['bits']:.2f} | {values} |")
        lines.append("")
    if calibration := _cells(folder, "calibration"):
        first = calibration[0]
        lines += [
            "## Calibration text chosen by a selector",
            "",
            f"tiny-llama, GPTQ at 3 bits in groups of 64, 64 windows of 256 tokens out of {max(first['windows'] // 2, 64)} that the seed draws",
            f"(*seed*: the first 64 drawn); KL divergence to the float model (perplexity {first['perplexity_float']:.2f}) on held-out text, mean",
            "and standard deviation over five seeds.",
            "",
            "| windows chosen by | KL | perplexity |",
            "|---|---|---|",
        ]
        for c in sorted(calibration, key=lambda c: mean(r["kl"] for r in c["runs"])):
            kl, ppl = ([r[key] for r in c["runs"]] for key in ("kl", "perplexity"))
            lines.append(f"| {c['cell']['selector']} | {mean(kl):.5f} ± {stdev(kl):.5f} | {mean(ppl):.3f} |")
        lines.append("")
    if prompts := _cells(folder, "prompts"):
        first = prompts[0]
        lines += [
            "## In-context classification",
            "",
            f"BBC topics by SmolLM2-135M-Instruct: {first['annotated']} annotated texts, of each the first 30 words; the most similar ones that",
            f"fit {first['tokens']} tokens are shown, the most similar last; the label whose first token is likeliest wins.",
            f"{first['items']} test texts for each of {len(first['runs'])} seeds (standard error of one run about 6 points), float and 4-bit (round",
            "to nearest, groups of 64); matrix products in bfloat16.",
            *[f"**{n}**" for n in first["notes"]],
            "",
            "| selector | float | w4a16-rtn |",
            "|---|---|---|",
        ]
        found = {(c["cell"]["selector"], c["cell"]["what"].removeprefix("smollm2-135m-")): [r["accuracy"] for r in c["runs"]] for c in prompts}
        for s in sorted({s for s, _ in found}):
            row = [_spread(found[s, form]) if (s, form) in found else "–" for form in ("float", "w4a16-rtn")]
            lines.append(f"| {s} | {row[0]} | {row[1]} |")
        lines.append("")
    return lines


def _picture(cells: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qcore"  # the same cells give the same bytes
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
    for name in sorted({c["cell"]["selector"] for c in cells}):
        points = sorted((int(c["cell"]["what"]), c["cpu_seconds"]) for c in cells if c["cell"]["selector"] == name)
        axis.plot([n for n, _ in points], [s for _, s in points], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="embeddings in the pool (384 dimensions)", ylabel="processor seconds for 100 choices")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def write(cells: Path) -> None:
    """Write selection.md and selection.svg into docs/evidence."""
    folder = cells.parents[1]
    times = _cells(cells, "time")
    lines = [
        "# Evidence: selection of examples",
        "",
        "Made by `python tools/bench/selection.py`: every figure is a cell under `cells/selection/`, with its settings and code version.",
        "Texts come from PyPI packages and are read in place (tools/bench/labelled.py).",
        "",
        *(Path(__file__).with_name("selection_reading.md").read_text().splitlines()),
        "",
    ]
    lines += _accuracy(_cells(cells, "accuracy")) + _times(times) + _storage(_cells(cells, "storage")) + _models(cells)
    (folder / "selection.md").write_text("\n".join(lines).rstrip() + "\n")
    if times:
        _picture(times, folder / "selection.svg")


if __name__ == "__main__":
    write(Path(__file__).resolve().parents[2] / "docs" / "evidence" / "cells" / "selection")
