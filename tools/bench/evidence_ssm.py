"""Evidence for state-space models: docs/evidence/ssm.md, its picture, and the cells behind it under docs/evidence/ssm/.

    python tools/bench/evidence_ssm.py                 every model whose weights are installed
    python tools/bench/evidence_ssm.py --only tiny-rwkv
    python tools/bench/evidence_ssm.py --page          the page again, from the cells

tiny-rwkv: weights of about 3 bits; tiny-mamba and typeseg-mamba: 8-bit activations with one static scale for each tensor, 8- and 4-bit weights.
Calibration is on qzoo's calib.txt, evaluation on eval.txt, last words on eval_novels.txt; seed 0.  Every model is saved and loaded before it is
measured.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CELLS = ROOT / "docs" / "evidence" / "ssm"
TEXT = ROOT / "packages" / "qzoo" / "src" / "qzoo" / "data" / "text"
SAMPLES, LENGTH, WINDOWS = 64, 256, 64

# label → recipe and overrides
NO_MU = 'rules.1={sites="*:mu", float=true}'
THREE = ("rules.0.format.bits=3", "rules.0.granularity.size=64", "calibration.starts=0")
RWKV = {
    "rtn": ("w4a16-rtn", (*THREE[:2], 'solver.clip="none"')),
    "rtn, clipped": ("w4a16-rtn", (*THREE[:2], 'solver.clip="mse"')),
    "awq": ("w4a16-awq", THREE),
    "gptq": ("w4a16-gptq", THREE),
    "gptvq": ("w3a16-rwkvquant", ("allocator.scalar_share=0.0", NO_MU)),
    "rwkvquant, μ float": ("w3a16-rwkvquant", (NO_MU,)),
    "rwkvquant": ("w3a16-rwkvquant", ()),
    "rwkvquant, μ unweighted": ("w3a16-rwkvquant", ('rules.1.solver={name="rtn"}',)),
    "rwkvquant, half vectors": ("w3a16-rwkvquant", ("allocator.scalar_share=0.5",)),
    "rwkvquant, crest rule": ("w3a16-rwkvquant", ('allocator.proxy="crest"',)),
}
QUAROT = '[{name="fold-norm"}, {name="hadamard", online=["*.out_proj:weight"]}]'
ROTATED_ONLY = (
    '[{name="fold-norm"}, {name="klt"}, {name="state-rotate"}, {name="hadamard", residual=false, inner=false, online=["*.out_proj:weight"]}]'
)
ACTIVATIONS = {
    "rtn": ("transforms=[]",),
    "smoothquant": ('transforms=[{name="smoothquant"}]',),
    "quarot": (f"transforms={QUAROT}",),
    "mambaquant, smoothing only": ('transforms=[{name="mamba-smooth"}]',),
    "mambaquant, rotations only": (f"transforms={ROTATED_ONLY}",),
    "mambaquant": (),
}
MAMBA = {f"{w}, {label}": (f"mambaquant-{w}", over) for w in ("w8a8", "w4a8") for label, over in ACTIVATIONS.items()}
READING = {
    "tiny-rwkv": (
        "Read: on this model RWKVQuant does not beat GPTQ alone. Its weights are all close to normal (no crest above 6, so the released rule finds",
        "nothing to store as vectors), and vectors at 3.5 bits are no better here than integers at 3.25. Element-wise vectors at 3 bits cost 0.002",
        "of KL, with weights or without. Last words tell nothing apart: the float model itself gets two in a hundred.",
    ),
    "tiny-mamba": (
        "Read: rotations of the state and of out_proj's input are the large step, smoothing adds to them and helps little alone. SmoothQuant's own",
        "links do not reach the gate or the state.",
    ),
    "typeseg-mamba": (
        "Read: LayerNorms allow no rotation of the residual stream; what helps is inside the blocks. Smoothing on top of rotations matters with",
        "4-bit weights.",
    ),
}
MODELS = {"tiny-rwkv": RWKV, "tiny-mamba": MAMBA, "typeseg-mamba": MAMBA}


def measure_all(name: str, methods: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, Any]:
    """Every method on one model.  → what docs/evidence/ssm/<name>.json holds"""
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward
    from qcore.plugins import load_registry

    registry = load_registry()
    loaded = load_source(f"zoo:{name}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    batches, task, words = data_of(loaded)
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        forward = float_forward(loaded, adapter)
        reference = task.reference(forward, Path(folder) / "reference")
        whole: dict[str, Any] = {"model": name, "notes": list(loaded.notes), "samples": SAMPLES, "length": LENGTH}
        if words:
            from qplug_ssm.last_word import last_word_accuracy

            whole["last_word_reference"], whole["passages"] = last_word_accuracy(forward, words), len(words)
        for label, (recipe, overrides) in methods.items():
            cells.append(
                {"label": label, "recipe": recipe, "overrides": list(overrides)} | measure(name, recipe, overrides, batches, task, reference, words)
            )
            print(
                f"{name}, {label}: {json.dumps(cells[-1]['scores'])} {cells[-1]['bits']:.3f} bits, {cells[-1]['seconds']} s",
                file=sys.stderr,
                flush=True,
            )
    return whole | {"cells": cells}


def data_of(loaded: Any) -> tuple[list[Any], Any, list[Any]]:
    """Calibration batches, the task, and passages for last words."""
    import torch
    from qcore.calibration.text import TextFile, cut, encode, to_batches
    from qcore.evaluation import Agreement, LanguageModeling
    from qcore.recipe import CalibrationSettings

    if loaded.tokenizer is None:
        from qplug_ssm.typeseg import to_bytes

        def windows(file: str, count: int) -> Any:
            there = cut(torch.tensor(to_bytes((TEXT / file).read_text("utf-8"))), LENGTH)
            return there[torch.randperm(len(there), generator=torch.Generator().manual_seed(0))[:count]]

        return to_batches(windows("calib.txt", SAMPLES), 8), Agreement(list(windows("eval.txt", WINDOWS).split(8))), []
    from qplug_ssm.last_word import passages

    windows_ = TextFile(TEXT / "calib.txt").windows(loaded.tokenizer, CalibrationSettings(samples=SAMPLES, length=LENGTH))
    ids = cut(encode(loaded.tokenizer, (TEXT / "eval.txt").read_text("utf-8"), "eval.txt"), LENGTH)[:WINDOWS]
    words = passages((TEXT / "eval_novels.txt").read_text("utf-8"), loaded.tokenizer, words=30)
    return to_batches(windows_, 8), LanguageModeling(ids, batch=8), words


def measure(name: str, recipe: str, overrides: tuple[str, ...], batches: Any, task: Any, reference: Any, words: list[Any]) -> dict[str, Any]:
    """Quantize, save, load again, compare with the float model."""
    from qcore.checkpoint import load, save
    from qcore.model import adapter_for, load_source
    from qcore.modules import serve_in
    from qcore.pipeline import compute_dtype, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    registry = load_registry()
    loaded = load_source(f"zoo:{name}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    started = time.perf_counter()
    q = quantize_model(loaded, load_recipe(recipe, registry, overrides), batches, registry=registry, adapter=adapter)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        serve_in(q.model, loaded.dtype)
        save(q.model, out, registry=registry, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
        model = load(out, registry=registry)
    serve_in(model, compute_dtype(loaded.dtype))

    def forward(batch: Any) -> Any:
        return adapter.outputs(model, batch)

    scores = task.evaluate(forward, reference)
    if words:
        from qplug_ssm.last_word import last_word_accuracy

        scores["last_word"] = last_word_accuracy(forward, words)
    sites = [s for s in q.sites if s.site.endswith(":weight")]
    return {
        "scores": scores,
        "bits": sum(8 * s.nbytes for s in sites) / sum(s.shape[0] * s.shape[1] for s in sites),
        "bits_with_vectors": sum(8 * s.nbytes for s in q.sites) / sum(s.shape[0] * s.shape[1] for s in q.sites),
        "seconds": round(seconds, 1),
        "choices": q.choices,
        "notes": q.notes,
    }


def page() -> str:
    """docs/evidence/ssm.md from the cells."""
    lines = [
        "# Evidence: state-space models",
        "",
        "Made by `python tools/bench/evidence_ssm.py`: every figure is a cell in `ssm/`, with recipe and overrides. Each model is quantized, saved,",
        f"loaded again, and compared with the float model on other text than that of calibration ({SAMPLES} windows of {LENGTH} tokens, seed 0).",
        "",
    ]
    for name in MODELS:
        file = CELLS / f"{name}.json"
        if not file.is_file():
            continue
        data = json.loads(file.read_text())
        first = data["cells"][0]["scores"]
        lines += [f"## {name}", "", *[f"**{note}**" for note in data["notes"]]]
        if "perplexity" in first:
            words = f"; last words {data['last_word_reference']:.3f} of {data['passages']} passages" if "last_word_reference" in data else ""
            lines += [f"Float perplexity {first['perplexity_reference']:.3f} on {first['tokens']:.0f} tokens of eval.txt{words}.", ""]
            lines += ["| | bits | KL to float | ± s.e. | top-1 | perplexity | last word |", "|---|---|---|---|---|---|---|"]
            for c in data["cells"]:
                s = c["scores"]
                lines.append(
                    f"| {c['label']} | {c['bits']:.3f} | {s['kl']:.4f} | {s['kl_standard_error']:.4f} | {s['top1']:.3f} "
                    f"| {s['perplexity']:.3f} | {s['last_word']:.3f} |"
                )
        else:
            lines += [f"Against its float self on {first['rows']:.0f} bytes of eval.txt.", ""]
            lines += ["| | bits | KL to float | ± s.e. | agreement | SQNR, dB |", "|---|---|---|---|---|---|"]
            for c in data["cells"]:
                s = c["scores"]
                lines.append(
                    f"| {c['label']} | {c['bits']:.3f} | {s['kl']:.5f} | {s['kl_standard_error']:.5f} | {s['top1']:.4f} | {s['sqnr_db']:.2f} |"
                )
        lines.append("")
        lines += [*READING.get(name, ()), ""]
        if name == "tiny-rwkv":
            lines += ["Which weights RWKVQuant stores how, by its two proxies:", "", "![proxies of tiny-rwkv's weights](ssm/proxies.svg)", ""]
    shapes = CELLS / "shapes.json"
    if shapes.is_file():
        lines += [
            "## Random weights of published shapes",
            "",
            "Whole streamed runs from disk, one block in memory at a time, 8 sequences of 128 random tokens, one thread, other work beside:",
            "`python tools/bench/ssm_shapes.py`. Nothing is said about quality. Peak memory is the kernel's counter, libraries (0.56 GB)",
            "and mapped files; anonymous memory was looked at between blocks.",
            "",
            "| | recipe | parameters | bits | seconds | peak GB | anonymous GB |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in json.loads(shapes.read_text()):
            memory = row["memory"]
            lines.append(
                f"| {row['shape']} | {row['recipe']} | {row['parameters'] / 1e6:.0f} M | {row['bits']:.3f} | {row['seconds']:.0f} "
                f"| {memory['peak_bytes'] / 1e9:.2f} | {memory['anonymous_bytes'] / 1e9:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def picture() -> None:
    """Every weight of tiny-rwkv at its two proxies, coloured by what was chosen."""
    import re

    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qcore"  # the same cells give the same bytes
    from matplotlib import pyplot

    data = json.loads((CELLS / "tiny-rwkv.json").read_text())
    choices = next(c["choices"] for c in data["cells"] if c["label"] == "rwkvquant")
    figure, axis = pyplot.subplots(figsize=(6.5, 4.5))
    for kind, marker in (("scalar", "o"), ("vector", "^")):
        found = [(site, re.search(r"coarse (\S+) .*fine (\S+) \(", why)) for site, why in choices.items() if why.startswith(kind)]
        points = [(site, float(m[1]), float(m[2])) for site, m in found if m]
        axis.scatter([p[1] for p in points], [p[2] for p in points], marker=marker, label=kind)
        if kind == "vector":
            for site, x, y in points:
                axis.annotate(site.removesuffix(":weight"), (x, y), fontsize=7, xytext=(4, 2), textcoords="offset points")
    axis.set(xlabel="coarse proxy", ylabel="fine proxy", yscale="log", title="tiny-rwkv: how uniform each weight is, and what it became")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(CELLS / "proxies.svg", metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="one model")
    parser.add_argument("--page", action="store_true", help="write the page from the cells that are there")
    a = parser.parse_args()
    CELLS.mkdir(parents=True, exist_ok=True)
    if not a.page:
        for name, methods in MODELS.items():
            if a.only in ("", name):
                (CELLS / f"{name}.json").write_text(json.dumps(measure_all(name, methods), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    (ROOT / "docs" / "evidence" / "ssm.md").write_text(page())
    if (CELLS / "tiny-rwkv.json").is_file():
        picture()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
