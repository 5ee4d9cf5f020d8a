"""The evidence for referring segmentation: what PTQ4RIS does to tiny-lavt, one JSON file a cell.

    python tools/bench/evidence_lavt.py                compute the cells that are missing, then docs/evidence/lavt.md
    python tools/bench/evidence_lavt.py --list         say which are missing, and compute nothing
    python tools/bench/evidence_lavt.py --table        write the page from the cells that are there
    python tools/bench/evidence_lavt.py --only w4a4-   the cells whose name contains this

Calibration: 32 triples of 512 of the training split, chosen by the seed.  Evaluation: 500 sentences about 250 pictures of the other split.  A cell
takes about 14 s of one core with PTQ4RIS's search (over a quarter of the rows that the recipe keeps) and 8 s without, a seed (22 cells) about 5
minutes.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
from cells import compute
from evidence import CACHE, ROOT, missing

_OWN = (
    *("adapter", "allocator", "capture", "fold", "formats", "lavt", "metrics", "percentiles", "regions", "search", "shapes", "solvers", "source"),
    *("task", "triples"),
)
evidence.ROOMS += [f"packages/qplug-segmentation/src/qplug_segmentation/{f}.py" for f in _OWN]

SEEDS = 3
PAGE = ROOT / "docs" / "evidence" / "lavt.md"
WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a4")
# label without width → (recipe without width, overrides, what it is)
METHODS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "uniform": ("lavt", (), "uniform: nearest weights per channel, min-max inputs"),
    "ptq4ris": ("ptq4ris", (), "PTQ4RIS"),
    "channel": ("ptq4ris", ('allocator.rows="channel"',), "PTQ4RIS, a scale for each row of Swin's weights"),
}
# a quarter of the rows and windows that the recipe keeps of each site: a search of 5 s in the place of 17
FEWER = ("allocator.sample_rows=256", "allocator.sample_windows=32")
ABLATED = ("w4a4", "w6a6")
ABLATIONS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no-softmax": ("ptq4ris", ('allocator.softmax="uniform"',), "without DRQ behind the softmax"),
    "no-gelu": ("ptq4ris", ("allocator.gelu=[]",), "without DRQ behind the GELU (an affine grid is searched)"),
    "no-rorq": ("ptq4ris", ("allocator.text=[]",), "without RORQ (range of least error)"),
    "no-hessian": ("ptq4ris", ('allocator.metric="mse"',), "without the Hessian (errors weigh alike)"),
    "no-any": (
        "ptq4ris",
        ('allocator.softmax="uniform"', "allocator.gelu=[]", "allocator.text=[]", 'allocator.metric="mse"'),
        "without all four: ranges and scales of least error alone",
    ),
    "nearest": ("ptq4ris", ('allocator.rule="nearest"',), "RORQ with the nearest number of any band"),
}


@dataclass(frozen=True)
class Cell(evidence.Cell):
    samples: int = 32
    length: int = 1
    windows: int = 500
    window: int = 1


def matrix() -> list[Cell]:
    """Seed by seed, so that a table with fewer seeds exists early."""
    cells = []
    for seed in range(SEEDS):
        for label, (recipe, extra, _) in METHODS.items():
            own = (*extra, *FEWER) if recipe == "ptq4ris" else extra
            cells += [Cell("tiny-lavt", f"{w}-{label}", f"{recipe}-{w}", own, seed=seed) for w in reversed(WIDTHS)]
        for label, (recipe, extra, _) in ABLATIONS.items():
            cells += [Cell("tiny-lavt", f"{w}-{label}", f"{recipe}-{w}", (*extra, *FEWER), seed=seed) for w in ABLATED]
    return cells


def measure(cell: Cell) -> dict[str, Any]:
    """Quantize, save, load again, and judge on the evaluation split, beside the float model."""
    from qcore.calibration.text import data_hash
    from qcore.checkpoint import load, save
    from qcore.evaluation.store import Reference
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    registry = load_registry()
    loaded = load_source(f"zoo:{cell.model}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    task = loaded.data.task()
    weights = Path(evidence.ROOT / "packages/qzoo/src/qzoo/data/tiny-lavt/record.json").read_text()
    place = CACHE / f"reference-{cell.model}-{task.data()[:12]}-{json.loads(weights)['files']['model.safetensors']['sha256'][:8]}"
    kept = (place / "reference.json").exists()
    reference = Reference.open(place) if kept else task.reference(float_forward(loaded, adapter), place)
    if not kept:
        loaded = load_source(f"zoo:{cell.model}", registry.sources)
    own = (f"calibration.samples={cell.samples}", f"calibration.seed={cell.seed}")
    recipe = load_recipe(cell.recipe, registry, (*cell.overrides, *own, *((f"allocator.seed={cell.seed}",) if "ptq4ris" in cell.recipe else ())))
    batches = loaded.data.batches(recipe.calibration)
    started = time.process_time()
    q = quantize_model(loaded, recipe, batches, registry=registry, adapter=adapter)
    seconds = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        save(q.model, out, registry=registry, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
        model = load(out, registry=registry)

        def forward(batch: Any) -> Any:
            return adapter.outputs(model, batch)

        scores = task.evaluate(forward, reference)
    return {
        "scores": scores,
        "bits": sum(8 * r.nbytes for r in q.sites) / sum(r.shape[0] * r.shape[1] for r in q.sites),
        "bytes": sum(r.nbytes for r in q.sites),
        "cpu_seconds": round(seconds, 1),
        "recipe": recipe.name,
        "calibration_sha256": data_hash(*[t for b in batches for t in (b["image"], b["ids"])]),
        "notes": q.notes,
    }


def page(cells: Sequence[Cell]) -> str:
    """The tables, from the cells that are there."""
    found = {c: json.loads(c.file.read_text()) for c in cells if c.file.exists()}
    stale = {c for c in missing(cells) if c in found}
    lines = [
        "# Referring segmentation: what PTQ4RIS does to tiny-lavt",
        "",
        "`python tools/bench/evidence_lavt.py` made this page; one JSON file a cell lies in `cells/tiny-lavt/`.",
        "Model: `zoo:tiny-lavt`, a LAVT of 1.5 million parameters trained on generated pictures of coloured shapes;",
        "calibration: 32 triples of the training split, chosen by the seed; evaluation: 500 sentences about 250 pictures of the other split.",
        f"PTQ4RIS searches on fewer rows than its recipes keep ({', '.join(FEWER)}).",
        "Figures are means over the seeds that were run, ± their standard deviation; IoU and agreement in percent.  The published figures are of",
        "Swin-B and BERT-base on RefCOCO: none of them is reproduced here.",
        "",
    ]
    reading = ROOT / "tools" / "bench" / "lavt_reading.md"
    if reading.is_file():
        lines += reading.read_text(encoding="utf-8").splitlines()
    some = next(iter(found.values()), None)
    header = [
        "| method | seeds | mIoU | oIoU | P@.5 | mIoU with the float model's masks | KL to the float model | weights, kB | seconds |",
        "|" + "---|" * 9,
    ]
    if some is not None:
        s = some["scores"]
        lines += ["", *header, f"| float32 | – | {100 * s['miou_reference']:.1f} | {100 * s['oiou_reference']:.1f} | – | 100 | 0 | – | – |"]
        for width in WIDTHS:
            lines += _rows(found, stale, width, METHODS)
        lines += ["", "## One part at a time left out", "", *header]
        for width in ABLATED:
            lines += _rows(found, stale, width, {"ptq4ris": METHODS["ptq4ris"], **ABLATIONS})
    return "\n".join(lines) + "\n"


def _rows(found: dict[Cell, dict[str, Any]], stale: set[Cell], width: str, methods: dict[str, tuple[str, tuple[str, ...], str]]) -> list[str]:
    rows = []
    for label, (_, _, words) in methods.items():
        own = [found[c] for c in found if c.label == f"{width}-{label}"]
        if not own:
            continue
        old = " (older code)" if any(c.label == f"{width}-{label}" for c in stale) else ""
        scores = [_spread(own, key, digits, factor) for key, digits, factor in
                  (("miou", 1, 100), ("oiou", 1, 100), ("p50", 1, 100), ("miou_to_float", 1, 100), ("kl", 4, 1))]  # fmt: skip
        rows.append(
            f"| {width.upper()} {words}{old} | {len(own)} | {' | '.join(scores)} | {own[0]['bytes'] / 1e3:.0f} | "
            f"{mean(o['cpu_seconds'] for o in own):.0f} |"
        )
    return rows


def _spread(own: Sequence[dict[str, Any]], score: str, digits: int, factor: float) -> str:
    values = [factor * o["scores"][score] for o in own]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> int:
    def said(result: dict[str, Any]) -> str:
        s = result["scores"]
        return f"mIoU {s['miou']:.4f} of {s['miou_reference']:.4f}, KL {s['kl']:.5f}"

    return compute(__doc__, matrix(), measure, said, lambda cells: PAGE.write_text(page(cells), encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
