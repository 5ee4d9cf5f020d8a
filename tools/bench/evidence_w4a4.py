"""The evidence for quantized activations and caches: rotations and scales, fixed and learned, one JSON file a cell.

    python tools/bench/evidence_w4a4.py                compute the cells that are missing, then docs/evidence/w4a4.md
    python tools/bench/evidence_w4a4.py --only tiny    only cells whose name contains the word
    python tools/bench/evidence_w4a4.py --minutes 2    begin no cell after two minutes
    python tools/bench/evidence_w4a4.py --list         say which are missing, and compute nothing
    python tools/bench/evidence_w4a4.py --table        write the page from the cells that are there

As `evidence.py`, whose cells stand beside these: the same key, the same scores, one process a cell.  Small on purpose: SmolLM2-135M is calibrated
on 16 windows of 512 tokens of news and measured on 6, tiny-llama on 32 of 256 tokens of its own text and measured on 16; the page says so.  What a
cell costs on one shared core: tiny-llama 5 to 30 seconds, 2 to 5 minutes where something is learned; SmolLM2-135M 10 seconds by RTN, 2 to 4 minutes
by GPTQ, an hour where something is learned.
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import evidence
from cells import compute, in_a_process
from evidence import CACHE, ROOT, code_files, code_hash

PAGE = ROOT / "docs" / "evidence" / "w4a4.md"
_CACHE_RULE = """
[[rules]]
sites = "*:[kv]"
format = { name = "int", bits = 4 }
granularity = "head"
offset = "code"
scale = "float16"
when = "dynamic"
window = 0
"""
# what is stored: base recipe, and what is added to it
SETTINGS = {"w8a8": ("rtn-w8a8", ""), "w4a8": ("rtn-w4a8", ""), "w4a4": ("rtn-w4a4", ""), "w4a4kv4": ("rtn-w4a4", _CACHE_RULE)}
_GPTQ = '[solver]\nname = "gptq"\n\n[calibration]\nstarts = 512\nprecision = "auto"\n'
_FOLD = '[[transforms]]\nname = "fold-norm"\n\n'
# how it is found: label → (transforms, solver and calibration, what it is)
METHODS = {
    "rtn": ("", "", "round to nearest"),
    "smoothquant": ('[[transforms]]\nname = "smoothquant"\n\n', "", "SmoothQuant, α = 0.5, then round to nearest"),
    "gptq": ("", _GPTQ, "GPTQ, nothing rotated"),
    "quarot": (_FOLD + '[[transforms]]\nname = "hadamard"\nrest = true\nheads = true\n\n', _GPTQ, "fixed Hadamard rotations, then GPTQ"),
    "spinquant": (
        _FOLD + '[[transforms]]\nname = "learn-rotations"\nstart = "hadamard"\nscales = false\nloss = "next-token"\n\n',
        _GPTQ,
        "learned rotations (next token), then GPTQ",
    ),
    "ostquant": (_FOLD + '[[transforms]]\nname = "learn-rotations"\n\n', _GPTQ, "learned rotations and scales (KL-Top), then GPTQ"),
}
LEARNED = ("spinquant", "ostquant")


@dataclass(frozen=True)
class Cell(evidence.Cell):
    """recipe: "setting/method" """

    @property
    def file(self) -> Path:
        return evidence.CELLS / "w4a4" / f"{self.name}.json"


def matrix() -> list[Cell]:
    """Every method under every setting; what is learned on SmolLM2-135M under 4-bit activations alone, where it takes an hour."""
    cells = []
    for model in ("tiny-llama", "smollm2-135m"):
        small = (
            {"samples": 32, "length": 256, "windows": 16, "window": 256, "text": "own"} if model == "tiny-llama" else {"samples": 16, "windows": 6}
        )
        for setting in SETTINGS:
            for method in METHODS:
                if model == "tiny-llama" or method not in LEARNED or setting == "w4a4kv4":
                    few = ("transforms.1.steps=50",) if model == "tiny-llama" and method in LEARNED else ()
                    cells.append(Cell(model, f"{setting}-{method}", f"{setting}/{method}", few, **small))
    return cells


def recipe_file(cell: Cell) -> Path:
    """The cell's recipe, written where `load_recipe` finds it."""
    setting, method = cell.recipe.split("/")
    base, more = SETTINGS[setting]
    transforms, solver, what = METHODS[method]
    file = CACHE / "recipes" / f"{setting}-{method}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'description = "{what}"\nextends = "{base}"\n{more}\n{transforms}{solver}')
    return file


def measure(cell: Cell) -> dict[str, Any]:
    """Quantize in memory, and compare with the float model.  Seconds and peak are those of `quantize_model`."""
    import os

    import torch
    from qcore.calibration.text import TextFile, cut, encode, start_batches, to_batches
    from qcore.evaluation import LanguageModeling, MemoryMeter
    from qcore.evaluation.store import Reference
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe import CalibrationSettings
    from qcore.recipe_file import load_recipe

    meter = MemoryMeter()
    registry = load_registry()
    loaded = load_source(f"zoo:{cell.model}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    if cell.text == "news":
        import news

        calib, evaluation = news.write(CACHE / "news")
        windows = cut(encode(loaded.tokenizer, calib.read_text(), str(calib)), cell.length)[: cell.samples]
    else:
        assert loaded.calibration is not None and loaded.evaluation is not None
        calib, evaluation = loaded.calibration, loaded.evaluation
        windows = TextFile(calib).windows(loaded.tokenizer, CalibrationSettings(samples=cell.samples, length=cell.length, seed=cell.seed))
    task = LanguageModeling(cut(encode(loaded.tokenizer, evaluation.read_text(), str(evaluation)), cell.window)[: cell.windows], batch=4)
    place = CACHE / f"reference-{cell.model}-{task.data()[:12]}"
    kept = (place / "reference.json").exists()
    reference = Reference.open(place) if kept else task.reference(float_forward(loaded, adapter), place)
    recipe = load_recipe(str(recipe_file(cell)), registry, cell.overrides)
    starts = start_batches(windows, recipe.calibration.starts, recipe.calibration.starts_weight, cell.seed)
    load_before, started = os.getloadavg()[0], time.perf_counter()
    q = quantize_model(loaded, recipe, to_batches(windows, 8) + starts, registry=registry, adapter=adapter, progress=lambda *_: meter.sample())
    seconds = time.perf_counter() - started
    scores = task.evaluate(lambda batch: adapter.outputs(q.model, batch), reference)
    files = code_files(SETTINGS[cell.recipe.split("/")[0]][0])
    weights = sum(r.shape[0] * r.shape[1] for r in q.sites)
    return {
        "scores": scores,
        "bits": sum(8 * r.nbytes for r in q.sites) / weights,
        "seconds": round(seconds, 1),
        "phases": q.seconds,
        "memory": meter.to_dict(),
        "load_average": round(load_before, 2),
        "threads": torch.get_num_threads(),
        "notes": [*loaded.notes, *q.notes],
        "transforms": [repr(t) for t in recipe.transforms],
        "files": files,
        "code": code_hash(files),
    }


def page(cells: list[Cell]) -> str:
    """The table of all cells that are there."""
    lines = [
        "# Quantized activations and caches",
        "",
        "Written by `tools/bench/evidence_w4a4.py` from the cells in `cells/w4a4/`. Float values, one seed, small windows: the standard error of KL "
        "is over windows.",
        "",
        "Weights are integers in groups of 64 (per channel at 8 bits), activations dynamic per token (symmetric at 8 bits, with a zero point at 4), "
        "KV4 adds keys after RoPE and values at 4 bits per token and head. Embedding and head stay float. Seconds are of the whole "
        "quantization on shared cores (load average beside them), peak is resident memory while quantizing.",
    ]
    for model in dict.fromkeys(c.model for c in cells):
        own = [(c, json.loads(c.file.read_text())) for c in cells if c.model == model and c.file.exists()]
        if not own:
            continue
        c, first = own[0]
        s, text = first["scores"], "news" if c.text == "news" else "its own text"
        lines += [
            "",
            f"## {model}",
            "",
            f"{s['windows']} windows of {s['window']} tokens ({text}), calibrated on {c.samples} of {c.length}; "
            f"float perplexity {s['perplexity_reference']:.2f}.",
            "",
            "| bits | method | KL ± | top-1 | perplexity | seconds | load | peak |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for cell, got in own:
            s, (setting, method) = got["scores"], cell.recipe.split("/")
            stale = "" if evidence.fresh(got) else " (by older code)"
            steps = f", {cell.overrides[0].rpartition('=')[2]} steps" if cell.overrides else ""
            scores = f"{s['kl']:.4f} ± {s['kl_standard_error']:.4f} | {s['top1']:.3f} | {s['perplexity']:.2f}"
            lines.append(
                f"| {setting.upper()} | {method}{steps}{stale} | {scores} | "
                f"{got['seconds']:.0f} | {got['load_average']:.1f} | {got['memory']['peak_bytes'] / 1e9:.2f} GB |"
            )
        learned = [n for _, got in own for n in got["notes"] if n.startswith("learned ")]
        if learned:
            lines += ["", "What learning did: " + "; ".join(dict.fromkeys(learned)) + "."]
    reading = Path(__file__).with_name("w4a4_reading.md")
    return "\n".join(lines) + "\n\n" + (reading.read_text() if reading.exists() else "")


def main() -> int:
    if sys.argv[1:2] == ["--cell"]:  # one cell, in a process of its own
        data = json.loads(sys.argv[2])
        print(json.dumps(measure(Cell(**{**data, "overrides": tuple(data["overrides"])}))))
        return 0

    def said(result: dict[str, Any]) -> str:
        return f"KL {result['scores']['kl']:.4f}"

    return compute(__doc__, matrix(), partial(in_a_process, __file__), said, lambda cells: PAGE.write_text(page(cells), encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
