"""The evidence for Q-PETR: what eight bits cost the two small detectors, and what SmoothQuant, QANS and DULUT bring, one JSON file a cell.

    python tools/bench/evidence_petr.py            compute the cells that are missing, then docs/evidence/petr.md
    python tools/bench/evidence_petr.py --list     say which are missing, and compute nothing
    python tools/bench/evidence_petr.py --table    write the page from the cells that are there

Models: `petr:tiny-petr` and `petr:tiny-qfpe`, which differ in their position embedding alone.  Calibration: 32 made scenes of training seeds,
which ones by the cell's seed.  Evaluation: 80 made scenes of evaluation seeds.  A cell takes about ten seconds of one core, all of them five
minutes.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
from cells import compute
from evidence import ROOT, code_files, code_hash

SEEDS = 2
EVALUATED = 80
PAGE = ROOT / "docs" / "evidence" / "petr.md"
MODELS = ("tiny-petr", "tiny-qfpe")


@dataclass(frozen=True)
class Cell(evidence.Cell):
    """smooth: whether SmoothQuant comes first;  softmax: "before", "float", "qans" or "qans-dulut" """

    samples: int = 32
    length: int = 0
    windows: int = EVALUATED
    window: int = 0
    text: str = "scenes"
    smooth: bool = False
    softmax: str = "before"

    @property
    def file(self) -> Path:
        return evidence.CELLS / "petr" / f"{self.name}.json"


# label → (SmoothQuant, softmax, what it is)
METHODS = {
    "plain": (False, "before", "`petr-w8a8`: logits rounded before they are stabilized"),
    "plain-float-softmax": (False, "float", "the same, logits float"),
    "smooth": (True, "before", "SmoothQuant, logits rounded before"),
    "smooth-float-softmax": (True, "float", "SmoothQuant, logits float"),
    "smooth-qans": (True, "qans", "SmoothQuant, QANS, exp in floats"),
    "fq-petr": (True, "qans-dulut", "`fq-petr-w8a8`: SmoothQuant, QANS, exp by DULUT"),
}


def matrix() -> list[Cell]:
    """Every method on both models, seed by seed, so that a table exists early."""
    return [
        Cell(model, label, "fq-petr-w8a8" if smooth else "petr-w8a8", seed=seed, smooth=smooth, softmax=softmax)
        for seed in range(SEEDS)
        for label, (smooth, softmax, _) in METHODS.items()
        for model in MODELS
    ]


def recipe_of(cell: Cell, registry: Any) -> Any:
    """The plain recipe, with the transforms that the cell asks for; logits are rounded by a rule only where it says "before"."""
    from qcore.recipe_file import load_recipe
    from qplug_perception.petr.qans import QANS

    base, full = (load_recipe(name, registry, ()) for name in ("petr-w8a8", "fq-petr-w8a8"))
    if cell.softmax == "qans-dulut" and cell.smooth:
        return full
    rules = base.rules if cell.softmax == "before" else tuple(r for r in base.rules if "scores" not in r.sites)
    transforms = [*base.transforms, *(t for t in full.transforms if t.name == "smoothquant" and cell.smooth)]
    if cell.softmax.startswith("qans"):
        transforms.append(QANS(exp="dulut" if cell.softmax == "qans-dulut" else "float"))
    return replace(base, name=cell.label, rules=rules, transforms=tuple(transforms))


_KEPT: dict[str, Any] = {}


def task_of(cell: Cell, loaded: Any, adapter: Any) -> tuple[Any, Any]:
    """The task and the float model's outputs on it, made once in a process."""
    from qcore.pipeline import float_forward
    from qplug_perception.petr.data import Detection, Made
    from qplug_perception.petr.scenes import EVALUATION

    if cell.model not in _KEPT:
        task = Detection(Made(EVALUATION, cell.windows).read(), loaded.model.config)
        place = Path(tempfile.mkdtemp(prefix="petr-reference-"))
        _KEPT[cell.model] = task, task.reference(float_forward(loaded, adapter), place)
    return _KEPT[cell.model]


def ranges(loaded: Any, batches: Sequence[Any]) -> dict[str, float]:
    """The largest magnitudes of features, of the position embedding, and of what keys are projected from, in the float model."""
    import torch

    model = type(loaded.model)(loaded.model.config).eval()
    model.load_state_dict({n: loaded.reader[n] for n in model.state_dict()})
    features = place = embedding = 0.0
    with torch.no_grad():
        for batch in batches:
            f, p, _ = model.memory(**batch)
            features, place = max(features, float(f.abs().max())), max(place, float(p.abs().max()))
            grid = model.image(batch["images"][:1].flatten(0, 1)).shape[-2:]
            own = model.position(batch["lidar2img"][:1], tuple(grid), tuple(batch["images"].shape[-2:]))
            embedding = max(embedding, float(own.abs().max()))
    return {"features": features, "embedding": embedding, "with_sine": place, "ratio": embedding / features}


def measure(cell: Cell) -> dict[str, Any]:
    """Quantize, save, load again, and compare with the float model."""
    from qcore.checkpoint import load, save
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import quantize_model
    from qcore.plugins import load_registry

    registry = load_registry()
    loaded = load_source(f"petr:{cell.model}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    recipe = recipe_of(cell, registry)
    settings = replace(recipe.calibration, samples=cell.samples, seed=cell.seed)
    batches = loaded.data.batches(settings)
    seen = ranges(loaded, batches[:1])
    task, reference = task_of(cell, loaded, adapter)
    fresh = load_source(f"petr:{cell.model}", registry.sources)
    q = quantize_model(fresh, recipe, batches, registry=registry, adapter=adapter)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        save(q.model, out, registry=registry, source=fresh.source, adapter=adapter.name, companions=fresh.write_companions)
        model = load(out, registry=registry)
        scores = task.evaluate(lambda batch: adapter.outputs(model, batch), reference)
    own = ROOT / "packages/qplug-perception/src/qplug_perception/petr"
    decide = [f for f in own.glob("*.py") if f.stem not in ("openmmlab", "released", "testing")]
    decide += [*own.glob("recipes/*.toml"), own / "zoo" / cell.model / "model.safetensors"]
    files = sorted({*code_files(cell.recipe), *(f.relative_to(ROOT).as_posix() for f in decide)})
    return {
        "scores": scores,
        "ranges": seen,
        "bits": sum(8 * r.nbytes for r in q.sites) / sum(r.shape[0] * r.shape[1] for r in q.sites),
        "betas": [note for note in q.notes if "β" in note],
        "recipe": recipe.name,
        "files": files,
        "code": code_hash(files),
    }


def page(cells: Sequence[Cell]) -> str:
    """The tables, from the cells that are there."""
    there = {c: json.loads(c.file.read_text()) for c in cells if c.file.exists()}
    lines = [
        "# Q-PETR: eight bits on two small detectors",
        "",
        "`python tools/bench/evidence_petr.py` made this page; one JSON file a cell lies in `cells/petr/`.",
        "Models: `petr:tiny-petr` and `petr:tiny-qfpe`, alike but for the position embedding, trained alike on made scenes",
        "(`tools/zoo/train_tiny_petr.py`).",
        "Weights and inputs of every layer have 8 bits and one scale a tensor, inputs static. Calibration: 32 scenes of training seeds.",
        f"Evaluation: {EVALUATED} scenes of evaluation seeds. mAP counts centres within 0.5, 1, 2 and 4 m, as nuScenes does.",
        "Figures are means over the seeds of calibration that were run, ± their standard deviation; each model was trained once.",
        "",
    ]
    for model in MODELS:
        own = [kept for c, kept in there.items() if c.model == model]
        if not own:
            continue
        r = own[0]["ranges"]
        lines += [
            f"## {model}",
            "",
            f"Float mAP {own[0]['scores']['map_reference']:.4f}. Largest magnitudes on calibration scenes: features {r['features']:.1f}, "
            f"position embedding {r['embedding']:.1f} ({r['ratio']:.1f} times as large), with the sine embedding {r['with_sine']:.1f}.",
            "",
            "| | seeds | mAP | change | same class | centres move, m | logits' SQNR, dB |",
            "|---|---|---|---|---|---|---|",
        ]
        for label, (_, _, words) in METHODS.items():
            found = [kept["scores"] for c, kept in there.items() if c.model == model and c.label == label]
            if found:
                change = _spread([s["map"] - s["map_reference"] for s in found], 4, signed=True)
                columns = [_spread([s["map"] for s in found], 4), change, f"{_spread([100 * s['agreement'] for s in found], 2)} %"]
                columns += [_spread([s["centre"] for s in found], 3), _spread([s["logit_sqnr_db"] for s in found], 1)]
                lines.append(f"| {words} | {len(found)} | {' | '.join(columns)} |")
        lines.append("")
    return "\n".join([*lines, *READING, ""])


# of all methods with seed 0, and the plain one with seed 1
READING = (
    "## Reading",
    "",
    "- The cause is here as the paper says: PETR's position embedding is 26 times as large as the features that it is added to, QFPE's 4 times.",
    "- What it does to eight bits shows in the logits' signal-to-noise ratio: 24 dB with PETR's positions, 30 dB with QFPE, by the same recipe.",
    "- In mAP the plain recipe loses 0.007 and 0.012 of 0.19 with PETR's positions, 0.010 and 0.019 of 0.22 with QFPE. That is far from the paper's",
    "  collapse (31 to 21 mAP), and differences of a hundredth mean little on 80 scenes: that PETR loses more mAP than QFPE was not found here.",
    "- Rounding logits before they are stabilized costs 3.5 and 4 dB. QANS gets all of it back: it cannot be told from float logits.",
    "- DULUT's exp costs nothing that shows, with the 168 keys that these models have; PETR has 16,896, and its error grows with them.",
    "- SmoothQuant brings 1 dB with PETR's positions. With QFPE it brings nothing: centres move further with it (0.042 m) than without (0.023 m).",
)


def _spread(values: Sequence[float], digits: int, signed: bool = False) -> str:
    first = f"{mean(values):+.{digits}f}" if signed else f"{mean(values):.{digits}f}"
    return first + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> int:
    def said(result: dict[str, Any]) -> str:
        s = result["scores"]
        return f"mAP {s['map']:.4f} of {s['map_reference']:.4f}, agreement {s['agreement']:.4f}, SQNR {s['logit_sqnr_db']:.1f} dB"

    return compute(__doc__, matrix(), measure, said, lambda cells: PAGE.write_text(page(cells), encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
