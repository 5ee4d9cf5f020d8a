"""The evidence for MVCTrack: what virtual points and quantization do to the small voxel tracker, one JSON file a cell.

    python tools/bench/evidence_mvctrack.py                compute the cells that are missing, then docs/evidence/mvctrack.md
    python tools/bench/evidence_mvctrack.py --list         say which are missing, and compute nothing
    python tools/bench/evidence_mvctrack.py --table        write the page from the cells that are there

Model: mvctrack:tiny, trained by tools/zoo/train_tiny_mvctrack.py on made-up sequences, half of them with virtual points.  Evaluation: 12 sequences of
8 frames from seed 100,000 on.  Calibration: 64 pairs of frames of training seeds.  A cell takes about 10 s of one core.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import evidence
from cells import compute
from evidence import CACHE, ROOT, missing

_OWN = ("adapter", "boxes", "data", "sequences", "tracker", "virtual_points", "voxels")
evidence.ROOMS += [f"packages/qplug-perception/src/qplug_perception/mvctrack/{f}.py" for f in _OWN]
evidence.ROOMS += ["packages/qplug-perception/src/qplug_perception/gsrender/scenes.py"]

PAGE = ROOT / "docs" / "evidence" / "mvctrack.md"
RECIPE = "mvctrack-w8a8"
SEQUENCES = 12
# label → (settings of the virtual points or None, overrides of the recipe or None = float, what it is)
METHODS: dict[str, tuple[dict[str, Any] | None, tuple[str, ...] | None, str]] = {
    "still": (None, None, "no network: the box never moves"),
    "raw": (None, None, "float, raw points"),
    "fixed": ({"fixed": 120}, None, "float, 120 virtual points an object, as the release"),
    "fixed-eroded": ({"fixed": 120, "erosion": 1}, None, "float, 120, masks eroded by a pixel"),
    "distance": ({}, None, "float, by distance"),
    "distance-eroded": ({"erosion": 1}, None, "float, by distance, masks eroded by a pixel"),
    "raw-far": (None, None, "float, objects 25 to 45 m away, raw points"),
    "fixed-far": ({"fixed": 120}, None, "float, 25 to 45 m, 120 virtual points an object"),
    "distance-far": ({}, None, "float, 25 to 45 m, by distance"),
    "w8a8": ({"erosion": 1}, (), "`mvctrack-w8a8`, by distance, eroded"),
    "w4a8-rtn": ({"erosion": 1}, ("rules.0.format.bits=4",), "4-bit weights to the nearest, by distance, eroded"),
    "w4a8-gptq": ({"erosion": 1}, ("rules.0.format.bits=4", 'solver={name="gptq",clip="mse",signed_scale=false}'), "4-bit weights by GPTQ, …"),
}


@dataclass(frozen=True)
class Cell(evidence.Cell):
    samples: int = 64
    length: int = 1
    windows: int = SEQUENCES
    window: int = 8


def matrix() -> list[Cell]:
    return [Cell("mvctrack-tiny", label, RECIPE, overrides or ()) for label, (_, overrides, _) in METHODS.items()]


def measure(cell: Cell) -> dict[str, Any]:
    """Tracks of the float or the quantized tracker, and where the virtual points lie."""
    from qcore.checkpoint import load, save
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe
    from qplug_perception.mvctrack.data import TrackingTask
    from qplug_perception.mvctrack.virtual_points import MVCPSettings

    options, overrides, _ = METHODS[cell.label]
    virtual = None if options is None else MVCPSettings(**options)
    registry = load_registry()
    loaded = load_source("mvctrack:tiny", registry.sources)
    adapter, config = adapter_for(loaded.model, registry.adapters), loaded.model.config
    data = replace(loaded.data, calibration=replace(loaded.data.calibration, virtual=virtual))
    task = TrackingTask(tuple(_tracks(cell, config, virtual)), config)
    forward = _still if cell.label == "still" else float_forward(loaded, adapter)
    place = CACHE / f"reference-mvctrack-{'still-' if cell.label == 'still' else ''}{task.data()[:12]}"
    reference = task.reference(forward, place)
    result: dict[str, Any] = {"points": _points(cell, virtual)}
    if overrides is None:
        return {**result, "scores": task.evaluate(forward, reference)}
    recipe = load_recipe(cell.recipe, registry, (f"calibration.samples={cell.samples}", "calibration.batch=16", *overrides))
    q = quantize_model(load_source("mvctrack:tiny", registry.sources), recipe, data.batches(recipe.calibration), registry=registry, adapter=adapter)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        save(q.model, out, registry=registry, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
        model = load(out, registry=registry)
        scores = task.evaluate(lambda batch: adapter.outputs(model, batch), reference)
    return {**result, "scores": scores, "bytes": sum(r.nbytes for r in q.sites)}


def _moments(cell: Cell) -> list[list[Any]]:
    """The evaluated sequences."""
    from qplug_perception.mvctrack.data import EVALUATION_SEED
    from qplug_perception.mvctrack.sequences import made_sequence

    distance = (25.0, 45.0) if cell.label.endswith("-far") else (8.0, 22.0)
    return [made_sequence(EVALUATION_SEED + i, cell.window, distance=distance) for i in range(cell.windows)]


def _tracks(cell: Cell, config: Any, virtual: Any) -> list[tuple[list[Any], Any]]:
    """(point clouds, true boxes) of each."""
    import torch
    from qplug_perception.mvctrack.data import cloud

    return [([cloud(m, config, virtual) for m in own], torch.stack([m.box for m in own])) for own in _moments(cell)]


def _still(batch: Any) -> Any:
    """What a tracker would have to beat."""
    import torch

    return torch.zeros(len(batch["size"]), 6)


def _points(cell: Cell, virtual: Any) -> dict[str, float]:
    """Of all evaluated frames: points on the object before and behind, and the share of virtual ones further than 0.3 m from its box."""
    from qplug_perception.mvctrack.boxes import inside
    from qplug_perception.mvctrack.virtual_points import virtual_points

    real = added = away = frames = 0
    for moment in [m for own in _moments(cell) for m in own]:
        frames += 1
        real += int(inside(moment.points[:, :3], moment.box, 0.1).sum())
        if virtual is not None:
            made = virtual_points(moment.points, moment.views, virtual)
            added += len(made)
            away += int((~inside(made.xyz, moment.box, 0.3)).sum())
    return {"real": real / frames, "virtual": added / frames, "away": away / max(added, 1)}


def page(cells: Sequence[Cell]) -> str:
    """The table, from the cells that are there."""
    found = {c: json.loads(c.file.read_text()) for c in cells if c.file.exists()}
    stale = [c.name for c in missing(cells) if c in found]
    lines = [
        "# MVCTrack: what virtual points and quantization do to the small tracker",
        "",
        "`python tools/bench/evidence_mvctrack.py` made this page; one JSON file a cell lies in `cells/mvctrack-tiny/`.",
        "Model: `mvctrack:tiny`, trained on made-up sequences by `tools/zoo/train_tiny_mvctrack.py`;",
        f"evaluation: {SEQUENCES} others of 8 frames, one seed. It is not nuScenes, and the paper's figures are not reproduced here.",
        "",
        "| | Success | Precision | drift from float, m | one step's SQNR, dB | points on the object | virtual points | … over 0.3 m off its box |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c, kept in found.items():
        s, p = kept["scores"], kept["points"]
        quantized = METHODS[c.label][1] is not None
        errors = f"{s['drift']:.3f} | {s['step_db']:.1f}" if quantized else " | "
        far = f"{p['away']:.1%}" if p["virtual"] else ""
        shares = f"{p['real']:.0f} | {p['virtual']:.0f} | {far}"
        lines.append(f"| {METHODS[c.label][2]} | {s['success']:.2f} | {s['precision']:.2f} | {errors} | {shares} |")
    if stale:
        lines += ["", f"Made by other code than is here: {', '.join(stale)}."]
    reading = Path(__file__).with_name("mvctrack_reading.md")
    if reading.is_file():
        lines += ["", reading.read_text(encoding="utf-8").rstrip()]
    return "\n".join(lines) + "\n"


def _finish(cells: Sequence[Cell]) -> None:
    PAGE.write_text(page(cells), encoding="utf-8")


def _said(result: dict[str, Any]) -> str:
    s = result["scores"]
    return f"Success {s['success']:.2f} Precision {s['precision']:.2f} (float {s['success_reference']:.2f} {s['precision_reference']:.2f})"


if __name__ == "__main__":
    raise SystemExit(compute(__doc__, matrix(), measure, _said, _finish))
