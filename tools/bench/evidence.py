"""The matrix of evidence: what each recipe does to each model, one JSON file a cell under docs/evidence/cells/.

    python tools/bench/evidence.py                compute the cells that are missing, then the table and the picture
    python tools/bench/evidence.py --list         say which are missing, and compute nothing
    python tools/bench/evidence.py --only tiny    only cells whose name contains the word

A cell is keyed by the code that made its numbers, the recipe with its overrides, the model, the data and the seed; one made by other code
is missing.  The code of a cell is the files of the rooms that make numbers which its own process had loaded, and it names them: a new solver
in a file of its own leaves the cells of the others as they are, and so do words that decide nothing (decisive.py) and edits that were shown to
change no number (witness.py).  Every cell runs in a process of its own, so its peak memory is its own.  Seconds are of `quantize_model` alone; the
load average beside them says whether the machine was quiet.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decisive import standing

ROOT = Path(__file__).resolve().parents[2]
CELLS = ROOT / "docs" / "evidence" / "cells"
CACHE = ROOT / ".qcore-cache" / "evidence"
# rooms whose code decides the numbers
ROOMS = [
    "packages/qcore/src/qcore/" + r for r in ("numbers", "model", "calibration", "transforms", "solvers", "packing", "modules", "ops", "pipeline")
]
ROOMS += ["packages/qcore/src/qcore/evaluation/metrics.py", "packages/qcore/src/qcore/recipes", "packages/qplug-llm/src"]


@dataclass(frozen=True)
class Cell:
    """One measurement.  recipe and overrides as `qcore quantize` takes them; windows × window tokens of evaluation"""

    model: str
    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    seed: int = 0
    samples: int = 64
    length: int = 512
    windows: int = 24
    window: int = 512
    text: str = "news"

    @property
    def name(self) -> str:
        return f"{self.model}/{self.label}-seed{self.seed}"

    @property
    def file(self) -> Path:
        return CELLS / f"{self.name}.json"


def matrix() -> list[Cell]:
    """What is measured.  smollm2-135m on news text, as the peers were; tiny-llama on its own text, GPTQ over five seeds."""
    cells = []
    methods = {
        "rtn": ("w{b}a16", "w4a16-rtn", ('solver.clip="none"',)),
        "rtn-clip": ("w{b}a16", "w4a16-rtn", ('solver.clip="mse"',)),
        "awq": ("w{b}a16", "w4a16-awq", ()),
        "gptq": ("w{b}a16", "w4a16-gptq", ()),
    }
    for bits in (4, 3, 2):
        for method, (_, recipe, extra) in methods.items():
            overrides = (f"rules.0.format.bits={bits}", "rules.0.granularity.size=64", *extra)
            label = f"w{bits}-{method}"
            cells.append(Cell("smollm2-135m", label, recipe, overrides))
            # five seeds where the ordering of methods is judged
            for seed in range(5 if bits == 3 and method in ("awq", "gptq") else 1):
                cells.append(Cell("tiny-llama", label, recipe, overrides, seed=seed, length=256, windows=64, window=256, text="own"))
    return cells


def code_files(recipe: str) -> list[str]:
    """Files of the rooms that decide numbers which this process has loaded, and the file of the recipe, relative to the root."""
    inside = tuple((ROOT / room).as_posix() for room in ROOMS)
    loaded = {Path(m.__file__).as_posix() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    files = [Path(f).relative_to(ROOT).as_posix() for f in loaded if f.startswith(inside)]
    files += [f.relative_to(ROOT).as_posix() for f in ROOT.glob(f"packages/*/src/*/recipes/{recipe}.toml")]
    return sorted(files)


def code_hash(files: list[str]) -> str:
    """A hash of what decides numbers in these files; one that is gone counts as changed."""
    h = hashlib.sha256()
    for name in files:
        file = ROOT / name
        h.update(f"{name} {standing(file) if file.exists() else 'gone'}\n".encode())
    return h.hexdigest()[:12]


def fresh(kept: dict[str, Any]) -> bool:
    """Whether the code that made a cell is the code that is here."""
    return bool(kept.get("files")) and kept["code"] == code_hash(kept["files"])


def missing(cells: Sequence[Any]) -> list[Any]:
    """The cells (dataclasses with a `file`) that nothing was measured for, or by other code, or with other settings."""

    def there(cell: Any) -> bool:
        if not cell.file.exists():
            return False
        kept = json.loads(cell.file.read_text())
        return fresh(kept) and kept["cell"] == json.loads(json.dumps(asdict(cell)))

    return [c for c in cells if not there(c)]


def measure(cell: Cell) -> dict[str, Any]:
    """Quantize, save, load again, and compare with the float model."""
    import torch
    from qcore.calibration.text import TextFile, cut, encode, start_batches, to_batches
    from qcore.checkpoint import load, save
    from qcore.evaluation import LanguageModeling, MemoryMeter
    from qcore.evaluation.store import Reference
    from qcore.model import adapter_for, load_source
    from qcore.modules import serve_in
    from qcore.pipeline import compute_dtype, float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe import CalibrationSettings
    from qcore.recipe_file import load_recipe

    meter = MemoryMeter()
    registry = load_registry()
    loaded = load_source(f"zoo:{cell.model}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    if cell.text == "news":
        sys.path.insert(0, str(ROOT / "tools" / "bench"))
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
    recipe = load_recipe(cell.recipe, registry, cell.overrides)
    starts = start_batches(windows, recipe.calibration.starts, recipe.calibration.starts_weight, cell.seed)
    load_before, started = os.getloadavg()[0], time.perf_counter()
    q = quantize_model(loaded, recipe, to_batches(windows, 8) + starts, registry=registry, adapter=adapter)
    seconds = time.perf_counter() - started
    memory = meter.to_dict()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        serve_in(q.model, loaded.dtype)
        save(q.model, out, registry=registry, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
        model = load(out, registry=registry)
        serve_in(model, compute_dtype(loaded.dtype))  # what is measured is the quantization, not another rounding of sums
        scores = task.evaluate(lambda batch: adapter.outputs(model, batch), reference)
    weights = sum(r.shape[0] * r.shape[1] for r in q.sites)
    files = code_files(cell.recipe)
    return {
        "code": code_hash(files),
        "files": files,
        "scores": scores,
        "bits": sum(8 * r.nbytes for r in q.sites) / weights,
        "seconds": round(seconds, 1),
        "phases": q.seconds,
        "memory": memory,
        "load_average": round(load_before, 2),
        "threads": torch.get_num_threads(),
        "notes": list(loaded.notes),
        "recipe": recipe.name,
        "solver": repr(recipe.solver),
        "mean_error": sum(r.error for r in q.sites) / len(q.sites),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which cells are missing")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--cell", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.cell:
        data = json.loads(a.cell)
        cell = Cell(**{**data, "overrides": tuple(data["overrides"])})
        print(json.dumps(measure(cell)))
        return 0
    todo = [c for c in missing(matrix()) if a.only in c.name]
    print(f"{len(todo)} of {len(matrix())} cells are missing", file=sys.stderr)
    if a.list:
        print("\n".join(c.name for c in todo))
        return 0
    failed = 0
    for cell in todo:
        started = time.perf_counter()
        run = subprocess.run([sys.executable, __file__, "--cell", json.dumps(asdict(cell))], capture_output=True, text=True, cwd=ROOT)
        if run.returncode:
            print(f"{cell.name}: failed\n{run.stderr[-2000:]}", file=sys.stderr)
            failed += 1
            continue
        result = {"cell": asdict(cell), **json.loads(run.stdout.splitlines()[-1])}
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        part = cell.file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        part.replace(cell.file)
        s = result["scores"]
        print(
            f"{cell.name}: KL {s['kl']:.4f} top-1 {s['top1']:.3f} ppl {s['perplexity']:.2f} ({time.perf_counter() - started:.0f} s)", file=sys.stderr
        )
    import evidence_table

    evidence_table.write(CELLS)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
