"""The evidence for GSRender: what quantization does to the small occupancy network, one JSON file a cell.

    python tools/bench/evidence_gsrender.py                compute the cells that are missing, then docs/evidence/gsrender.md
    python tools/bench/evidence_gsrender.py --list         say which are missing, and compute nothing
    python tools/bench/evidence_gsrender.py --table        write the page from the cells that are there

Model: gsrender:tiny, trained by tools/zoo/train_tiny_gsrender.py on made-up streets.  Calibration: 16 streets of the training seeds, others for each
seed; evaluation: 12 streets from seed 100,000 on.  A cell takes about 10 s of one core, the sweep about 60 s.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
from cells import compute
from evidence import CACHE, ROOT, missing

_OWN = ("adapter", "compress", "data", "formats", "gaussians", "geometry", "metrics", "model", "render", "scenes", "sweep")
evidence.ROOMS += [f"packages/qplug-perception/src/qplug_perception/gsrender/{f}.py" for f in _OWN]

PAGE = ROOT / "docs" / "evidence" / "gsrender.md"
RECIPE = "gsrender-w8a8"
SEEDS = 1
_NEAREST = "rules.4.format.keep_side=false"
_KNOWN = 'granularity="tensor",observer={name="known-range",low=0.0,high=1.0}'
_UNIFORM = f'rules.4={{sites="head.opacity:value",format={{name="int",bits=%d,signed=false}},{_KNOWN}}}'
_HEAD = tuple(f"rules.{i}.format.bits=4" for i in (2, 3, 4, 5))
# label → (overrides, what it is)
METHODS: dict[str, tuple[tuple[str, ...], str]] = {
    "w8a8": ((), "`gsrender-w8a8`"),
    "w8a8-nearest": ((_NEAREST,), "… opacity to the nearest number, τ on the grid"),
    "w8a8-uniform": ((_UNIFORM % 8,), "… opacity on 256 uniform numbers, τ not on the grid"),
    "w8a8-percentile": (('rules.1.observer={name="percentile"}',), "… inputs by percentile"),
    "w8a8-head4": (_HEAD, "… every attribute on 4 bits"),
    "w8a8-head4-uniform": ((*_HEAD[:2], _HEAD[3], _UNIFORM % 4), "… every attribute on 4 bits, opacity uniform"),
    "w4a8-rtn": (("rules.0.format.bits=4",), "4-bit weights, to the nearest"),
    "w4a8-gptq": (("rules.0.format.bits=4", 'solver={name="gptq",clip="mse",signed_scale=false}'), "4-bit weights, GPTQ"),
}
SCORES = (("rayiou", 100, 2), ("rayiou_1", 100, 2), ("depth_l1", 1, 3), ("semantic_ce", 1, 4), ("top1", 100, 2), ("flips", 100, 3))


@dataclass(frozen=True)
class Cell(evidence.Cell):
    samples: int = 16
    length: int = 1
    windows: int = 12
    window: int = 1


def matrix() -> list[Cell]:
    """Every method over the seeds, seed by seed; the sweep and the compressed sets once."""
    cells = [Cell("gsrender-tiny", label, RECIPE, extra, seed=seed) for seed in range(SEEDS) for label, (extra, _) in METHODS.items()]
    return [*cells, Cell("gsrender-tiny", "sweep", RECIPE, windows=4), Cell("gsrender-tiny", "compress", RECIPE)]


def measure(cell: Cell) -> dict[str, Any]:
    """Quantize, save, load again, and compare with the float model and the truth."""
    from qcore.calibration.text import data_hash
    from qcore.checkpoint import load, save
    from qcore.evaluation.task import tensors_of
    from qcore.model import adapter_for, load_source
    from qcore.model.reader import materialize
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    registry = load_registry()
    loaded = load_source("gsrender:tiny", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    if cell.label in ("sweep", "compress"):
        materialize(loaded.model, "", loaded.reader, loaded.dtype)
        return _swept(loaded, cell) if cell.label == "sweep" else _compressed(loaded)
    task = loaded.data.task()
    place = CACHE / f"reference-gsrender-{task.data()[:12]}"
    reference = task.reference(float_forward(loaded, adapter), place)
    amount = (f"calibration.samples={cell.samples}", f"calibration.seed={cell.seed}")
    # the regions meet at the network's own threshold; uniform numbers have no such thing
    regions = () if "uniform" in cell.label else (f"rules.4.format.threshold={loaded.model.config.threshold}",)
    recipe = load_recipe(cell.recipe, registry, (*amount, *regions, *cell.overrides))
    batches = loaded.data.batches(recipe.calibration)
    q = quantize_model(loaded, recipe, batches, registry=registry, adapter=adapter)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        save(q.model, out, registry=registry, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
        model = load(out, registry=registry)
        scores = task.evaluate(lambda batch: adapter.outputs(model, batch), reference)
    return {
        "scores": scores,
        "bytes": sum(r.nbytes for r in q.sites),
        "calibration_sha256": data_hash(*(t for b in batches for t in tensors_of(b))),
        "evaluation_sha256": task.data(),
    }


def _swept(loaded: Any, cell: Cell) -> dict[str, Any]:
    """Each attribute alone on fewer bits, on the first streets."""
    from dataclasses import asdict

    from qplug_perception.gsrender.data import OccupancyTask, batch_of
    from qplug_perception.gsrender.sweep import sweep

    config = loaded.model.config
    task = OccupancyTask(tuple(loaded.data.evaluation.read(cell.windows)), config)
    with tempfile.TemporaryDirectory() as folder:
        points = sweep(loaded.model.eval(), [batch_of(loaded.data.calibration.read(8))], task, Path(folder), (8, 4, 3, 2))
    return {"points": [asdict(p) for p in points], "scores": points[0].scores}


def _compressed(loaded: Any) -> dict[str, Any]:
    """The Gaussians of each evaluated street as stored sets, by bits of the codebook: bytes, and what they are worth."""
    import torch
    from qplug_perception.gsrender.compress import Compression, compress, float_bytes
    from qplug_perception.gsrender.data import OccupancyTask, batch_of
    from qplug_perception.gsrender.gaussians import Attributes

    config, found = loaded.model.config, {}
    samples = tuple(loaded.data.evaluation.read())
    with torch.no_grad():
        rows = [loaded.model.eval()(batch_of([s]))[0] for s in samples]
    task = OccupancyTask(samples, config)
    with tempfile.TemporaryDirectory() as folder:
        kept = iter(rows)
        reference = task.reference(lambda batch: next(kept), Path(folder))
        for bits in (8, 6, 4, 2):
            settings = Compression(prune=0.05, threshold=config.threshold, codebook=bits)
            sets = [compress(Attributes.from_rows(r), config.grid, config.reach, settings) for r in rows]
            back = iter([s.attributes().rows() for s in sets])
            scores = task.evaluate(lambda batch, back=back: next(back), reference)  # type: ignore[misc]
            found[str(bits)] = {"bytes": mean(s.nbytes for s in sets), "gaussians": mean(len(s) for s in sets), "scores": scores}
    whole = float_bytes(Attributes.from_rows(rows[0]))
    return {"sets": found, "float_bytes": whole, "voxels": config.grid.count, "scores": found["8"]["scores"]}


def page(cells: Sequence[Cell]) -> str:
    """The tables, from the cells that are there."""
    found = {c: json.loads(c.file.read_text()) for c in cells if c.file.exists()}
    stale = [c.name for c in missing(cells) if c in found]
    lines = [
        "# GSRender: what quantization does to the small occupancy network",
        "",
        "`python tools/bench/evidence_gsrender.py` made this page; one JSON file a cell lies in `cells/gsrender-tiny/`.",
        "Model: `gsrender:tiny`, trained on made-up streets of boxes by `tools/zoo/train_tiny_gsrender.py`, from 2D labels. Calibration: 16 streets",
        f"of training seeds ({SEEDS} calibration{'s' if SEEDS > 1 else ''}); evaluation: 12 others, whose voxels are known.",
        "It is not nuScenes, and the paper's figures are not reproduced here.",
        "",
        "| | RayIoU | @1 m | depth L1, m | semantic CE | same label, % | free ↔ occupied, % |",
        "|---|---|---|---|---|---|---|",
    ]
    of = {label: [found[c]["scores"] for c in found if c.label == label] for label in METHODS}
    first = next((own for own in of.values() if own), None)
    if first:
        floats = " | ".join(f"{first[0].get(f'{n}_reference', {'top1': 1.0, 'flips': 0.0}.get(n, 0)) * k:.{d}f}" for n, k, d in SCORES)
        lines.append(f"| float | {floats} |")
    for label, (_, words) in METHODS.items():
        if own := of[label]:
            values = [_with_deviation([s[n] * k for s in own], d) for n, k, d in SCORES]
            lines.append(f"| {words} | {' | '.join(values)} |")
    for c, kept in found.items():
        if c.label == "sweep":
            lines += [
                "",
                f"Each attribute alone on fewer bits, everything else float, {c.windows} streets (`qcore gsrender sweep gsrender:tiny`):",
                "",
            ]
            lines += ["| attribute | bits | own SQNR, dB | RayIoU | depth L1, m | semantic CE | same label, % |", "|---|---|---|---|---|---|---|"]
            for p in kept["points"]:
                s, own_db = p["scores"], p["scores"].get(f"{p['attribute']}_db")
                db = f"{own_db:.1f}" if own_db is not None else ""
                values = f"{100 * s['rayiou']:.2f} | {s['depth_l1']:.3f} | {s['semantic_ce']:.4f} | {100 * s['top1']:.2f}"
                lines.append(f"| {p['attribute']} | {p['bits'] or ''} | {db} | {values} |")
        if c.label == "compress":
            whole = f"{kept['voxels']} of them as float32 are {kept['float_bytes']:,} bytes"
            lines += ["", f"A street's Gaussians as a stored set (`qcore gsrender compress`); {whole}:", ""]
            lines += ["| codebook | Gaussians | bytes | RayIoU | depth L1, m | semantic CE | same label, % |", "|---|---|---|---|---|---|---|"]
            for bits, own_set in kept["sets"].items():
                s = own_set["scores"]
                values = f"{100 * s['rayiou']:.2f} | {s['depth_l1']:.3f} | {s['semantic_ce']:.4f} | {100 * s['top1']:.2f}"
                lines.append(f"| {bits} bits | {own_set['gaussians']:.0f} | {own_set['bytes']:,.0f} | {values} |")
    if stale:
        lines += ["", f"Made by other code than is here: {', '.join(stale)}."]
    reading = Path(__file__).with_name("gsrender_reading.md")
    if reading.is_file():
        lines += ["", reading.read_text(encoding="utf-8").rstrip()]
    return "\n".join(lines) + "\n"


def _with_deviation(values: Sequence[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _finish(cells: Sequence[Cell]) -> None:
    PAGE.write_text(page(cells), encoding="utf-8")


def _said(result: dict[str, Any]) -> str:
    s = result["scores"]
    return f"RayIoU {s['rayiou']:.4f} (float {s['rayiou_reference']:.4f}), depth {s['depth_l1']:.3f}, same label {s['top1']:.4f}"


if __name__ == "__main__":
    raise SystemExit(compute(__doc__, matrix(), measure, _said, _finish))
