"""The evidence for convolutional networks: what each solver, bias correction and equalization do to EfficientNet-Lite0, one JSON file a cell.

    python tools/bench/evidence_cnn.py            compute the cells that are missing, then docs/evidence/cnn.md
    python tools/bench/evidence_cnn.py --list     say which are missing, and compute nothing
    python tools/bench/evidence_cnn.py --table    write the page from the cells that are there

As `evidence.py`: the same key.  Calibration: 16 crops of seven photographs of scikit-image; evaluation: 64 crops of eight other ones, 224 × 224.
There are no ImageNet labels here, so each model is compared with its float self: top-1 agreement, KL, and the signal-to-noise ratio of the logits.
A cell costs 30 to 80 seconds of one core, most of it passes of calibration layer by layer, those with AdaRound about ten minutes; about 3 GB.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cells import compute
from evidence import CACHE, CELLS, ROOT, fresh

PAGE = ROOT / "docs" / "evidence" / "cnn.md"
SEEDS = 2


@dataclass(frozen=True)
class Cell:
    """One measurement.  samples: calibration crops; images: evaluation crops; seed: of the calibration crops"""

    model: str
    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    seed: int = 0
    samples: int = 16
    images: int = 64

    @property
    def name(self) -> str:
        return f"{self.model}/{self.label}-seed{self.seed}"

    @property
    def file(self) -> Path:
        return CELLS / f"{self.name}.json"


_RTN = ('solver={name="rtn",clip="none"}',)
_CLIP = ('solver={name="rtn",clip="mse",signed_scale=false}',)
_KEEP = ("correct_bias=false",)
_CLE = ('transforms=[{name="fold-batchnorm"},{name="equalize"}]',)
_LAYERS = 'solver={name="adaround",clip="mse",signed_scale=false}'
_ADAROUND = 'block_solver={name="adaround"}'
_WIDTHS = ",".join(f'{{spec={{format={{name="int",bits={bits}}},granularity="channel"}}}}' for bits in (4, 8))
_MIXED = f'allocator={{name="mixed",bits=5.0,metric="mse",solver={{name="gptq",clip="mse",signed_scale=false}},candidates=[{_WIDTHS}]}}'
_TENSOR = ('rules.0.granularity="tensor"',)
# label → (recipe, overrides, what it is)
METHODS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "w8a8-tensor": ("cnn-w8a8", (*_TENSOR, *_KEEP), "one weight scale a layer, nearest"),
    "w8a8-tensor-cle": ("cnn-w8a8", (*_TENSOR, *_KEEP, *_CLE), "… and cross-layer equalization"),
    "w8a8-tensor-cle-bias": ("cnn-w8a8", (*_TENSOR, *_CLE), "… and bias correction"),
    "w8a8-rtn": ("cnn-w8a8", _KEEP, "per channel, nearest"),
    "w8a8": ("cnn-w8a8", (), "… and bias correction: the recipe `cnn-w8a8`"),
    "w8a8-minmax": ("cnn-w8a8", ('rules.1.observer={name="minmax"}',), "… with ranges of activations that clip nothing"),
    "w4a8-rtn": ("cnn-w4a8", (*_RTN, *_KEEP), "per channel, nearest"),
    "w4a8-clip": ("cnn-w4a8", (*_CLIP, *_KEEP), "… with a clip search"),
    "w4a8-clip-bias": ("cnn-w4a8", _CLIP, "… and bias correction"),
    "w4a8-clip-cle-bias": ("cnn-w4a8", (*_CLIP, *_CLE), "… and cross-layer equalization"),
    "w4a8-gptq": ("cnn-w4a8", _KEEP, "GPTQ"),
    "w4a8": ("cnn-w4a8", (), "… and bias correction: the recipe `cnn-w4a8`"),
    "w4a8-cle": ("cnn-w4a8", _CLE, "… and cross-layer equalization"),
    "w4a8-adaround-layers": ("cnn-w4a8", (_LAYERS,), "AdaRound layer by layer (400 steps), bias correction"),
    "w4a8-clip-adaround": ("cnn-w4a8", (*_CLIP, _ADAROUND), "a clip search, AdaRound over the whole network (200 steps), bias correction"),
    "w4a8-adaround": ("cnn-w4a8", (_ADAROUND,), "GPTQ, AdaRound over the whole network (200 steps), bias correction"),
    "w4a8-mixed-5": ("cnn-w4a8", (_MIXED,), "4 or 8 bits a layer under a budget of 5 (by squared error), GPTQ, bias correction"),
}


def matrix() -> list[Cell]:
    """Every method once, those that calibration data change over three seeds."""
    seeded = ("w8a8", "w4a8", "w4a8-gptq", "w4a8-clip-bias")
    first = [Cell("efficientnet-lite0", label, recipe, overrides) for label, (recipe, overrides, _) in METHODS.items()]
    more = [Cell("efficientnet-lite0", n, METHODS[n][0], METHODS[n][1], seed=seed) for seed in range(1, SEEDS) for n in seeded]
    return [*first, *more]


def measure(cell: Cell) -> dict[str, Any]:
    """Quantize, save, load again, and compare with the float model."""
    import torch
    from qcore.calibration.text import data_hash
    from qcore.checkpoint import load, save
    from qcore.evaluation import Agreement
    from qcore.evaluation.store import Reference
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe
    from qzoo.images import photographs

    registry = load_registry()
    loaded = load_source(f"zoo:{cell.model}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    batches = list(photographs("calibration", cell.samples, seed=cell.seed).split(8))
    task = Agreement(list(photographs("evaluation", cell.images).split(16)))
    place = CACHE / f"reference-{cell.model}-{task.data()[:12]}"
    kept = (place / "reference.json").exists()
    reference = Reference.open(place) if kept else task.reference(float_forward(loaded, adapter), place)
    recipe = load_recipe(cell.recipe, registry, cell.overrides)
    started = time.perf_counter()
    q = quantize_model(loaded, recipe, batches, registry=registry, adapter=adapter)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        save(q.model, out, registry=registry, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
        model = load(out, registry=registry)
        scores = task.evaluate(lambda batch: adapter.outputs(model, batch), reference)
    kernels = [m.explain().kernel.name for m in model.modules() if callable(getattr(m, "explain", None))]
    weights = sum(r.shape[0] * r.shape[1] for r in q.sites)
    return {
        "scores": scores,
        "bits": sum(8 * r.nbytes for r in q.sites) / weights,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "recipe": recipe.name,
        "solver": repr(recipe.solver),
        "kernels": {name: kernels.count(name) for name in sorted(set(kernels))},
        "calibration_sha256": data_hash(*batches),
        "mean_error": sum(r.error for r in q.sites) / len(q.sites),
    }


def page(cells: Sequence[Cell]) -> str:
    """The tables, from the cells that are there."""
    lines = [
        "# Convolutional networks: EfficientNet-Lite0 at W8A8 and W4A8",
        "",
        "`python tools/bench/evidence_cnn.py` made this page; one JSON file a cell lies in `cells/efficientnet-lite0/`.",
        "Model: `zoo:efficientnet-lite0`, ImageNet weights, batch norms folded; every convolution and the classifier quantized, additions float.",
        "Calibration: 16 crops of seven photographs of scikit-image.  Evaluation: 64 crops of eight other photographs, 224 × 224.",
        "There are no ImageNet labels here: each model is compared with its float self, whose agreement is 100 % and whose KL is 0.  Crops of",
        "one photograph are alike, and many show nothing that ImageNet names: agreement is coarse, KL and the signal-to-noise ratio are finer.",
        "Activations: 8 bits, one static scale and zero point a tensor, ranges of least rounding error unless a row says otherwise.",
        "Figures are means over the calibration seeds that were run, ± their standard deviation.",
        "",
    ]
    for bits in (8, 4):
        lines += [
            f"## W{bits}A8",
            "",
            "| method | | seeds | top-1 agreement | KL to the float model | signal-to-noise, dB | bits per weight |",
            "|---|---|---|---|---|---|---|",
        ]
        for label, (_, _, words) in METHODS.items():
            own = [json.loads(c.file.read_text()) for c in cells if c.label == label and label.startswith(f"w{bits}") and c.file.exists()]
            if own:
                scores = (f"{_spread(own, 'top1', 1, 100)} %", _spread(own, "kl", 4), _spread(own, "sqnr_db", 2))
                lines.append(f"| {' | '.join((f'`{label}`', words, str(len(own)), *scores, format(own[0]['bits'], '.2f')))} |")
        lines.append("")
    if any(not fresh(json.loads(c.file.read_text())) for c in cells if c.file.exists()):
        lines += ["† made by older code; `python tools/bench/evidence_cnn.py` computes it anew.", ""]
    if absent := sum(not c.file.exists() for c in cells):
        lines += [f"Not measured yet: {absent} of {len(cells)} cells.", ""]
    latency = CELLS / "efficientnet-lite0" / "latency.json"
    if latency.exists():
        from cnn_latency import table

        lines += table(json.loads(latency.read_text()))
    reading = Path(__file__).with_name("cnn_reading.md")
    if reading.exists():
        lines += [reading.read_text(encoding="utf-8").rstrip(), ""]
    return "\n".join(lines)


def _spread(own: Sequence[dict[str, Any]], score: str, digits: int, factor: float = 1.0) -> str:
    values = [factor * o["scores"][score] for o in own]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> int:
    def said(result: dict[str, Any]) -> str:
        s = result["scores"]
        return f"top-1 {s['top1']:.3f} KL {s['kl']:.4f} SQNR {s['sqnr_db']:.2f} dB"

    return compute(__doc__, matrix(), measure, said, lambda cells: PAGE.write_text(page(cells), encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
