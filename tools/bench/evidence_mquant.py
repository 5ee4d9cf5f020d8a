"""The evidence for MQuant: what scales by modality and the channel of means kept apart do to tiny-llava, one JSON file a cell.

    python tools/bench/evidence_mquant.py            compute the cells that are missing, then docs/evidence/mquant.md
    python tools/bench/evidence_mquant.py --list     say which are missing, and compute nothing
    python tools/bench/evidence_mquant.py --table    write the page from the cells that are there

Model: multimodal:tiny-llava.  Calibration: 128 drawn scenes with four questions each, of a seed that is no evaluation seed; evaluation: 400 other
scenes, 1,600 answers, the words before each given.  A cell takes about 4 s of one core, all 20 about 2 minutes.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import evidence
from cells import compute
from evidence import CACHE, ROOT, code_files, code_hash

SEEDS = 2
PAGE = ROOT / "docs" / "evidence" / "mquant.md"
_OWN = "packages/qplug-multimodal/src/qplug_multimodal/"

# label → (recipe, overrides, what it is)
METHODS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "unrotated": ("vlm-static-w4a8", ("transforms=[]",), "static, one scale for each input, nothing rotated"),
    "dynamic": ("vlm-dynamic-w4a8", (), "rotated, a scale for each token while it runs"),
    "static": ("vlm-static-w4a8", (), "rotated, static, one scale for each input"),
    "msq": ("mquant-w4a8", ('transforms.3.when="never"',), "and two scales in the language model, tokens in order (MSQ + AIFS)"),
    "mquant": ("mquant-w4a8", ('transforms.3.when="any"',), "and the channel of means kept apart where any row asks for it (RMS)"),
}
WIDTHS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}


@dataclass(frozen=True)
class Cell(evidence.Cell):
    """samples: scenes;  windows: scenes of the evaluation"""

    samples: int = 128
    length: int = 42
    windows: int = 400
    window: int = 42


def overrides_of(label: str, width: str) -> tuple[str, tuple[str, ...]]:
    """(recipe, overrides) of a method at so many bits."""
    recipe, extra, _ = METHODS[label]
    weights, inputs = WIDTHS[width]
    inputs_rule = 2 if recipe == "vlm-dynamic-w4a8" else 1  # it extends the static recipe by a rule
    own = [f"rules.0.format.bits={weights}", f"rules.{inputs_rule}.format.bits={inputs}", *extra]
    if recipe == "mquant-w4a8":
        own.append(f"transforms.5.bits={inputs}")
    return recipe, tuple(own)


def matrix() -> list[Cell]:
    """Every method at every width, seed by seed."""
    cells = []
    for seed in range(SEEDS):
        # with 8-bit inputs nothing is left to tell apart: one seed
        for width in WIDTHS if seed == 0 else ("w4a4",):
            for label in METHODS:
                recipe, own = overrides_of(label, width)
                cells.append(Cell("tiny-llava", f"{width}-{label}", recipe, own, seed=seed, text="own"))
    return cells


def measure(cell: Cell) -> dict[str, Any]:
    """Quantize, save, load again, and compare with the float model."""
    from qcore.calibration.text import data_hash
    from qcore.checkpoint import load, save
    from qcore.evaluation.store import Reference
    from qcore.evaluation.task import tensors_of
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    registry = load_registry()
    loaded = load_source("multimodal:tiny-llava", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    task = loaded.data.task()
    place = CACHE / f"reference-{cell.model}-{task.data()[:12]}"
    kept = (place / "reference.json").exists()
    reference = Reference.open(place) if kept else task.reference(float_forward(loaded, adapter), place)
    settings = (f"calibration.samples={cell.samples}", f"calibration.seed={cell.seed}", "calibration.batch=32")
    recipe = load_recipe(cell.recipe, registry, (*cell.overrides, *settings))
    batches = loaded.data.batches(recipe.calibration)
    started = time.perf_counter()
    q = quantize_model(loaded, recipe, batches, registry=registry, adapter=adapter)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        save(q.model, out, registry=registry, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
        model = load(out, registry=registry)
        scores = task.evaluate(lambda batch: adapter.outputs(model, batch), reference)
    gaps = sorted(float(m.scale[1] / m.scale[0]) for m in model.modules() if type(m).__name__ == "ModalInput")
    files = list(dict.fromkeys([*code_files(cell.recipe), *_own_files()]))
    return {
        "scores": scores,
        "bits": sum(8 * r.nbytes for r in q.sites) / sum(r.shape[0] * r.shape[1] for r in q.sites),
        "seconds": round(seconds, 1),
        "recipe": recipe.name,
        "calibration_sha256": data_hash(*(t for b in batches for t in tensors_of(b))),
        "mean_error": sum(r.error for r in q.sites) / len(q.sites),
        "visual over text scale": {"least": gaps[0], "median": median(gaps), "most": gaps[-1]} if gaps else None,
        "split": sum(".coarse" in r.site for r in q.sites),
        "files": files,
        "code": code_hash(files),
    }


def _own_files() -> list[str]:
    """This plug-in's files that the process has loaded, and the model."""
    loaded = {Path(m.__file__).as_posix() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    inside = (ROOT / _OWN).as_posix()
    other = ("__init__.py", "two_tower.py")  # what is registered, another family
    files = sorted(Path(f).relative_to(ROOT).as_posix() for f in loaded if f.startswith(inside) and not f.endswith(other))
    # the dynamic recipe extends the static one
    return [*files, f"{_OWN}recipes/vlm-static-w4a8.toml", f"{_OWN}data/tiny-llava/model.safetensors"]


def page(cells: Sequence[Cell]) -> str:
    """The tables, from the cells that are there, and the reading, which is a file of its own: it is written once the figures are known."""
    found = {c: json.loads(c.file.read_text()) for c in cells if c.file.exists()}
    lines = [
        "# Vision-language models: what MQuant's parts do to tiny-llava",
        "",
        "`python tools/bench/evidence_mquant.py` made this page; one JSON file a cell lies in `cells/tiny-llava/`.",
        "Model: `multimodal:tiny-llava`, a LLaVA of 0.44 million parameters trained on drawn scenes.",
        "Calibration: 128 scenes of a seed that is no evaluation seed. Evaluation: 400 other scenes, 1,600 one-word answers,",
        "the words before each given.",
        "Weights by GPTQ, one scale for each output channel; patch embedding and head float.",
        "Figures are means over calibration seeds, ± their standard deviation. One answer is 0.06 points; `lost` and `gained` are the",
        "shares of answers that only the float model, or only the quantized one, has right.",
        "",
    ]
    if found:
        lines += [f"Float accuracy: {100 * next(iter(found.values()))['scores']['accuracy_reference']:.2f} %.", ""]
    for width in WIDTHS:
        lines += [f"## {width.upper()}", "", "| method | | seeds | KL to the float model | accuracy | lost / gained | signal to noise |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for label, (_, _, words) in METHODS.items():
            own = [kept for c, kept in found.items() if c.label == f"{width}-{label}"]
            if own:
                moved = f"{_spread(own, 'lost', 2, 100)} / {_spread(own, 'gained', 2, 100)} %"
                cols = (_spread(own, "kl", 5), f"{_spread(own, 'accuracy', 2, 100)} %", moved, f"{_spread(own, 'sqnr_db', 1)} dB")
                lines.append(f"| {' | '.join((f'`{label}`', words, str(len(own)), *cols))} |")
        lines.append("")
    gaps = [kept["visual over text scale"] for kept in found.values() if kept["visual over text scale"]]
    if gaps:
        least, most = min(g["least"] for g in gaps), max(g["most"] for g in gaps)
        middle = median(g["median"] for g in gaps)
        split = {kept["split"] for c, kept in found.items() if c.label.endswith("mquant")}
        lines += [
            f"The scale of visual tokens over that of text: {least:.2f} to {most:.2f}, median {middle:.2f} (the paper's models: about 40).",
            f"Layers that RMS splits: {', '.join(map(str, sorted(split)))} of 2.",
            "",
        ]
    reading = ROOT / "tools" / "bench" / "mquant_reading.md"
    return "\n".join([*lines, reading.read_text(encoding="utf-8") if reading.exists() else ""])


def _spread(own: Sequence[dict[str, Any]], score: str, digits: int, factor: float = 1.0) -> str:
    values = [factor * o["scores"][score] for o in own]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> int:
    def said(result: dict[str, Any]) -> str:
        return f"KL {result['scores']['kl']:.5f} accuracy {result['scores']['accuracy']:.4f}"

    return compute(__doc__, matrix(), measure, said, lambda cells: PAGE.write_text(page(cells), encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
