"""The evidence for state-space models: MambaQuant on tiny-mamba and typeseg-mamba, RWKVQuant on tiny-rwkv; one JSON file a cell.

    python tools/bench/evidence_ssm.py                     compute the cells that are missing, then docs/evidence/ssm.md and its picture
    python tools/bench/evidence_ssm.py --list              say which are missing, and compute nothing
    python tools/bench/evidence_ssm.py --table             write the page from the cells that are there
    python tools/bench/evidence_ssm.py --only tiny-rwkv/   the cells whose name contains this

tiny-rwkv: weights of about 3 bits; tiny-mamba and typeseg-mamba: 8-bit activations with one static scale for each tensor, 8- and 4-bit weights;
random weights of published shapes: time and memory alone (ssm_shapes.py).  Calibration is 16 windows of 128 tokens (bytes) of qzoo's calib.txt,
chosen by the seed; evaluation 32 windows of 256 of eval.txt, last words of 96 passages of eval_novels.txt.  Every model is saved and loaded before
it is measured.  Few windows and seeds, ablations of one seed: so that all of it takes about 30 minutes of one core, 10 s a cell of tiny-rwkv, 10 to
35 s of the Mambas, five minutes for both shapes.  Seed by seed: what is stopped early has every method once.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
from cells import compute
from evidence import CACHE, ROOT, missing

evidence.ROOMS += ["packages/qplug-ssm/src"]

SEEDS = 3
PASSAGES = 96
PAGE = ROOT / "docs" / "evidence" / "ssm.md"
PICTURE = PAGE.with_name("ssm.svg")
TEXT = ROOT / "packages" / "qzoo" / "src" / "qzoo" / "data" / "text"


@dataclass(frozen=True)
class Cell(evidence.Cell):
    samples: int = 16
    length: int = 128
    windows: int = 32
    window: int = 256
    text: str = "own"


@dataclass(frozen=True)
class Method:
    """words: what it is, for the table;  seeds: of calibration data; 1 where no data is looked at, or where one is enough for an ablation"""

    words: str
    recipe: str
    overrides: tuple[str, ...] = ()
    seeds: int = SEEDS


NO_MU = 'rules.1={sites="*:mu", float=true}'
THREE = ("rules.0.format.bits=3", "rules.0.granularity.size=64")
RWKV = {
    "rtn": Method("RTN; no data", "w4a16-rtn", (*THREE, 'solver.clip="none"'), 1),
    "rtn-clip": Method("RTN, scales searched; no data", "w4a16-rtn", (*THREE, 'solver.clip="mse"'), 1),
    "awq": Method("AWQ", "w4a16-awq", (*THREE, "calibration.starts=0")),
    "gptq": Method("GPTQ", "w4a16-gptq", (*THREE, "calibration.starts=0")),
    "gptvq": Method("GPTVQ, every weight", "w3a16-rwkvquant", ("allocator.scalar_share=0.0", NO_MU)),
    "rwkvquant-mu-float": Method("RWKVQuant, element-wise vectors float", "w3a16-rwkvquant", (NO_MU,)),
    "rwkvquant": Method("RWKVQuant", "w3a16-rwkvquant"),
    "rwkvquant-mu-plain": Method("RWKVQuant, element-wise codebooks without weights", "w3a16-rwkvquant", ('rules.1.solver={name="rtn"}',), 1),
    "rwkvquant-half": Method("RWKVQuant, half of the weights as vectors", "w3a16-rwkvquant", ("allocator.scalar_share=0.5",), 1),
    "rwkvquant-crest": Method("RWKVQuant, the released rule (crest above 8)", "w3a16-rwkvquant", ('allocator.proxy="crest"',), 1),
}
_FOLD, _SMOOTH, _KLT, _STATE, _CENTRE = (
    '{name="fold-norm"}',
    '{name="mamba-smooth"}',
    '{name="klt"}',
    '{name="state-rotate"}',
    '{name="mamba-centre"}',
)
_ONLINE = '{name="hadamard", residual=false, inner=false, online=["*.out_proj:weight"]}'


def _transforms(*names: str) -> tuple[str, ...]:
    return (f"transforms=[{', '.join(names)}]",)


_TOKENS = tuple(
    f'rules.{i}={{sites="*.readout*:{t}", format={{name="int", bits=8}}, granularity="token", when="dynamic"}}' for i, t in ((2, "h"), (3, "c"))
)
ACTIVATIONS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "rtn": ("RTN", _transforms(), SEEDS),
    "smoothquant": ("SmoothQuant", _transforms('{name="smoothquant"}'), SEEDS),
    "quarot": ("QuaRot-style", _transforms(_FOLD, '{name="hadamard", online=["*.out_proj:weight"]}'), SEEDS),
    "smoothing": ("MambaQuant, smoothing alone", _transforms(_SMOOTH), 1),
    "rotations": ("MambaQuant, rotations alone", _transforms(_FOLD, _KLT, _STATE, _ONLINE), 1),
    "mambaquant": ("MambaQuant", (), SEEDS),
    "no-means": ("MambaQuant without the subtraction of means", _transforms(_FOLD, _SMOOTH, _KLT, _STATE, _ONLINE), 1),
    "s1": ("MambaQuant with S1", _transforms(_FOLD, _SMOOTH, _KLT, _STATE, _CENTRE, _ONLINE, '{name="mamba-gain"}'), 1),
    "per-token": ("MambaQuant, h and C with a scale for each token", _TOKENS, 1),
}
MAMBA = {
    f"{bits}-{label}": Method(words, f"mambaquant-{bits}", overrides, seeds)
    for bits in ("w8a8", "w4a8")
    for label, (words, overrides, seeds) in ACTIVATIONS.items()
}
# with 4-bit weights its divergences differ up to threefold from seed to seed: rotations alone are measured on all seeds too
TYPESEG = {label: replace(m, seeds=SEEDS) if label.endswith("-rotations") else m for label, m in MAMBA.items()}
MODELS = {"tiny-rwkv": RWKV, "tiny-mamba": MAMBA, "typeseg-mamba": TYPESEG}
SHAPES = {"rwkv7-0.1b": "w3a16-rwkvquant", "mamba-130m": "mambaquant-w8a8"}


def matrix() -> list[Cell]:
    """Every method, seed by seed; the shapes before the last seed."""
    shapes = [Cell("ssm-shapes", shape, recipe, samples=8, windows=0, window=0, text="random") for shape, recipe in SHAPES.items()]
    cells = []
    for seed in range(SEEDS):
        cells += shapes if seed == SEEDS - 1 else []
        for model, methods in MODELS.items():
            cells += [Cell(model, label, m.recipe, m.overrides, seed=seed) for label, m in methods.items() if seed < m.seeds]
    return cells


def data_of(cell: Cell, loaded: Any) -> tuple[list[Any], Any, list[Any]]:
    """Calibration batches, the task, and passages for last words."""
    import torch
    from qcore.calibration.text import TextFile, cut, encode, to_batches
    from qcore.evaluation import Agreement, LanguageModeling
    from qcore.recipe import CalibrationSettings

    if loaded.tokenizer is None:
        from qplug_ssm.typeseg import to_bytes

        def windows(file: str, length: int, count: int, seed: int) -> Any:
            there = cut(torch.tensor(to_bytes((TEXT / file).read_text("utf-8"))), length)
            return there[torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))[:count]]

        calibration = windows("calib.txt", cell.length, cell.samples, cell.seed)
        return to_batches(calibration, 8), Agreement(list(windows("eval.txt", cell.window, cell.windows, 0).split(8))), []
    from qplug_ssm.last_word import passages

    settings = CalibrationSettings(samples=cell.samples, length=cell.length, seed=cell.seed)
    ids = cut(encode(loaded.tokenizer, (TEXT / "eval.txt").read_text("utf-8"), "eval.txt"), cell.window)[: cell.windows]
    words = passages((TEXT / "eval_novels.txt").read_text("utf-8"), loaded.tokenizer, words=30, limit=PASSAGES)
    return to_batches(TextFile(TEXT / "calib.txt").windows(loaded.tokenizer, settings), 8), LanguageModeling(ids, batch=8), words


def measure(cell: Cell) -> dict[str, Any]:
    """Quantize, save, load again, and compare with the float model."""
    from qcore.checkpoint import load, save
    from qcore.evaluation.store import Reference
    from qcore.model import adapter_for, load_source
    from qcore.modules import serve_in
    from qcore.pipeline import compute_dtype, float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    if cell.model == "ssm-shapes":
        return measure_shape(cell)
    registry = load_registry()
    loaded = load_source(f"zoo:{cell.model}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    batches, task, words = data_of(cell, loaded)
    place = CACHE / f"reference-{cell.model}-{task.data()[:12]}"
    kept = (place / "reference.json").exists()
    reference = Reference.open(place) if kept else task.reference(float_forward(loaded, adapter), place)
    before = float_last_words(cell.model, loaded, adapter, words)
    started = time.perf_counter()
    q = quantize_model(loaded, load_recipe(cell.recipe, registry, cell.overrides), batches, registry=registry, adapter=adapter)
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
    if before is not None:
        from qplug_ssm.last_word import last_words

        after = last_words(forward, words)
        moved = after.log_probability - before.log_probability
        scores |= {
            "last_word": after.accuracy,
            "last_word_reference": before.accuracy,
            "last_word_log_probability": float(after.log_probability.mean()),
            "last_word_log_probability_reference": float(before.log_probability.mean()),
            "last_word_moved": float(moved.abs().mean()),
            "last_word_gained": float(moved.mean()),
            "last_word_gained_standard_error": float(moved.std()) / math.sqrt(len(words)),
            "passages": len(words),
        }
    sites = [s for s in q.sites if s.site.endswith(":weight")]
    return {
        "scores": scores,
        "bits": sum(8 * s.nbytes for s in sites) / sum(s.shape[0] * s.shape[1] for s in sites),
        "bits_with_vectors": sum(8 * s.nbytes for s in q.sites) / sum(s.shape[0] * s.shape[1] for s in q.sites),
        "seconds": round(seconds, 1),
        "choices": q.choices,
        "notes": list(loaded.notes),
        "run_notes": q.notes,
        "mean_error": sum(s.error for s in q.sites) / len(q.sites),
    }


_FLOAT_WORDS: dict[str, Any] = {}


def float_last_words(name: str, loaded: Any, adapter: Any, words: list[Any]) -> Any:
    """What the float model makes of the last words, once for each model; None where there are none."""
    from qcore.pipeline import float_forward
    from qplug_ssm.last_word import last_words

    if words and name not in _FLOAT_WORDS:
        _FLOAT_WORDS[name] = last_words(float_forward(loaded, adapter), words)
    return _FLOAT_WORDS.get(name)


def measure_shape(cell: Cell) -> dict[str, Any]:
    """Time and memory of a streamed run on random weights, in a process of its own; and the files of code that it loaded."""
    script = str(Path(__file__).with_name("ssm_shapes.py"))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, script, "write", cell.label, folder], check=True)
        run = subprocess.run([sys.executable, script, "run", cell.label, folder], check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


# the page --------------------------------------------------------------------------------------------------------------------------------

Results = dict[Cell, dict[str, Any]]


def of(found: Results, model: str, label: str) -> list[dict[str, Any]]:
    return [r for c, r in found.items() if (c.model, c.label) == (model, label)]


def spread(own: Sequence[dict[str, Any]], score: str, digits: int, factor: float = 1.0) -> str:
    values = [factor * o["scores"][score] for o in own]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(found: Results, stale: set[Cell], model: str, methods: dict[str, Method]) -> list[str]:
    """A row for each method, those that nobody measured too."""
    words = any("last_word" in r["scores"] for c, r in found.items() if c.model == model)
    columns = ["KL to float", "top-1 agreement", *(("perplexity", "last words: log-probability", "moved by", "right") if words else ("SQNR, dB",))]
    lines = [f"| | seeds | bits | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for label, method in methods.items():
        own = of(found, model, label)
        name = f"{label.partition('-')[0]}: {method.words}" if methods is not RWKV else method.words
        if not own:
            lines.append(f"| {name} | 0 of {method.seeds} | " + " | ".join(["missing"] + ["–"] * len(columns)) + " |")
            continue
        old = " (older code)" if any((c.model, c.label) == (model, label) for c in stale) else ""
        seeds = str(len(own)) if len(own) == method.seeds else f"{len(own)} of {method.seeds}"
        figures = [spread(own, "kl", 5), f"{spread(own, 'top1', 1, 100)} %"]
        if words:
            figures += [spread(own, "perplexity", 3), spread(own, "last_word_log_probability", 3), spread(own, "last_word_moved", 3)]
            figures.append(f"{spread(own, 'last_word', 1, 100)} %")
        else:
            figures.append(spread(own, "sqnr_db", 2))
        lines.append(f"| {name}{old} | {seeds} | {own[0]['bits']:.3f} | {' | '.join(figures)} |")
    return lines


def kl_and_noise(own: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean KL, and how sure it is: the deviation between seeds, or of one seed the standard error over tokens."""
    values = [o["scores"]["kl"] for o in own]
    return mean(values), stdev(values) if len(values) > 1 else own[0]["scores"]["kl_standard_error"]


def on_common_seeds(found: Results, model: str, labels: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The results of each method on the seeds that all of them have; empty where there is none."""
    by_seed = [{c.seed: r for c, r in found.items() if (c.model, c.label) == (model, label)} for label in labels]
    common = sorted(set.intersection(*map(set, by_seed)))
    return [[own[seed] for seed in common] for own in by_seed] if common else []


def verdict(found: Results, model: str, one: str, other: str) -> str | None:
    """ "closer to the float model (KL 0.0071 against 0.0093)", "farther …" or "not told apart …"; None where one of them is missing."""
    both = on_common_seeds(found, model, (one, other))
    if not both:
        return None
    (x, dx), (y, dy) = map(kl_and_noise, both)
    count = len(both[0])
    figures = f"KL {x:.5f} against {y:.5f}, {count} seed{'s' if count > 1 else ''}"
    if abs(x - y) <= 2 * math.hypot(dx, dy):
        return f"not told apart ({figures})"
    return f"{'closer to' if x < y else 'farther from'} the float model ({figures})"


def reading(found: Results, model: str, methods: dict[str, Method]) -> list[str]:
    """What the table shows, made from its figures: a recomputation changes the sentences with them."""
    return _read_rwkv(found, model) if methods is RWKV else [line for bits in ("w8a8", "w4a8") for line in _read_mamba(found, model, bits)]


def _sentences(found: Results, model: str, pairs: Sequence[tuple[str, str, str]]) -> list[str]:
    return [f"- {what}: {said}." for what, one, other in pairs if (said := verdict(found, model, one, other)) is not None]


def _read_rwkv(found: Results, model: str) -> list[str]:
    lines = _sentences(
        found,
        model,
        (
            ("GPTQ beside RTN with searched scales", "gptq", "rtn-clip"),
            ("GPTVQ on every weight, at 0.25 bits more, beside GPTQ", "gptvq", "gptq"),
            ("RWKVQuant's choice of scalars and vectors (element-wise vectors float) beside GPTQ alone", "rwkvquant-mu-float", "gptq"),
            ("Element-wise vectors at 3 bits beside float ones", "rwkvquant", "rwkvquant-mu-float"),
            ("Their codebooks weighted by E[x²] beside plain k-means", "rwkvquant", "rwkvquant-mu-plain"),
            ("Half of the weights as vectors beside a tenth", "rwkvquant-half", "rwkvquant"),
        ),
    )
    if three := on_common_seeds(found, model, ("rwkvquant-mu-float", "gptq", "gptvq")):
        hybrid, scalar, vector = (kl_and_noise(own)[0] for own in three)
        holds = "holds" if hybrid <= 1.02 * min(scalar, vector) else "does not hold"
        lines.append(f"- The hybrid at most 2 % worse than the better of all scalars and all vectors: {holds}.")
    if crest := of(found, model, "rwkvquant-crest"):
        vectors = sum(why.startswith("vector") for why in crest[0]["choices"].values())
        lines.append(f"- The released rule stores {vectors} of {len(crest[0]['choices'])} weights as vectors: that many have a crest above 8.")
    return lines + _read_words(found, model)


def _read_words(found: Results, model: str) -> list[str]:
    """Whether last words tell anything."""
    own = [r["scores"] for c, r in found.items() if c.model == model]
    if not own:
        return []
    s = own[0]
    right, count = s["last_word_reference"], s["passages"]
    error = math.sqrt(max(right * (1 - right), 1 / count) / count)
    said = [o["last_word"] for o in own]
    apart = "tell methods apart" if max(said) - min(said) > 4 * error else "tell no methods apart"
    loud = [o for o in own if abs(o["last_word_gained"]) > 2 * o["last_word_gained_standard_error"]]
    moved = [o["last_word_moved"] for o in own]
    return [
        f"- The float model says {round(right * count)} of {count} last words right, ± {100 * error:.1f} points, the quantized ones"
        f" {100 * min(said):.1f} to {100 * max(said):.1f} %: shares of right words {apart}. The log-probability of a passage's last word is a"
        " finer measure: it moves by"
        f" {min(moved):.3f} to {max(moved):.3f} nats on average, from method to method. Its mean"
        f" ({s['last_word_log_probability_reference']:.3f} for the float model) changes by more than two"
        f" standard errors in {len(loud)} of {len(own)} cells."
    ]


def _read_mamba(found: Results, model: str, bits: str) -> list[str]:
    own = f"{bits}-mambaquant"
    name = bits.upper()
    lines = _sentences(
        found,
        model,
        (
            (f"{name}, SmoothQuant beside RTN", f"{bits}-smoothquant", f"{bits}-rtn"),
            (f"{name}, MambaQuant beside QuaRot-style", own, f"{bits}-quarot"),
            (f"{name}, smoothing alone beside RTN", f"{bits}-smoothing", f"{bits}-rtn"),
            (f"{name}, both halves beside rotations alone", own, f"{bits}-rotations"),
            (f"{name}, without the subtraction of means", f"{bits}-no-means", own),
            (f"{name}, S1 on top", f"{bits}-s1", own),
            (f"{name}, h and C with a scale for each token", f"{bits}-per-token", own),
        ),
    )
    if both := on_common_seeds(found, model, (f"{bits}-rtn", own)):
        rtn, mine = (kl_and_noise(results)[0] for results in both)
        lines.append(f"- {name}, RTN's divergence is {rtn / mine:.1f} times MambaQuant's.")
    return lines


def page(cells: Sequence[Cell]) -> str:
    """docs/evidence/ssm.md from the cells that are there."""
    found = {c: json.loads(c.file.read_text()) for c in cells if c.file.exists()}
    late = missing(cells)
    stale = {c for c in late if c in found}
    gone = sum(c not in found for c in cells)
    first = cells[0]
    lines = [
        "# Evidence: state-space models",
        "",
        "`python tools/bench/evidence_ssm.py` made this page, its sentences too: one JSON file a cell lies in `cells/<model>/`, with recipe and",
        f"overrides. Calibration: {first.samples} windows of {first.length} tokens (bytes) of calib.txt, chosen by the seed.",
        f"Evaluation: {first.windows} windows of {first.window} of eval.txt, against the float model; each model is quantized, saved and",
        "loaded again. Figures are means over the seeds, ± their standard deviation. Every method observes activations by the same percentile",
        "(99.9999 %), so rows differ in transforms and solvers alone. One seed beside one seed is judged by the standard errors over tokens.",
        "“Moved by” is the mean magnitude of the change of a last word's log-probability, in nats.",
        "",
    ]
    if gone or stale:
        lines += [f"**Not complete: {gone} of {len(cells)} cells are missing, {len(stale)} were made by older code.**", ""]
    for name, methods in MODELS.items():
        own = [r for c, r in found.items() if c.model == name]
        lines += [f"## {name}", ""]
        lines += [f"**{note}**\n" for note in (own[0]["notes"] if own else ())]
        if own and "perplexity" in own[0]["scores"]:
            s = own[0]["scores"]
            lines += [f"Float perplexity {s['perplexity_reference']:.3f} on {s['tokens']:.0f} tokens of eval.txt.", ""]
        elif own:
            lines += [f"Against its float self on {own[0]['scores']['rows']:.0f} bytes of eval.txt.", ""]
        lines += [*table(found, stale, name, methods), "", "Read:", "", *reading(found, name, methods), ""]
        if name == "tiny-rwkv" and of(found, name, "rwkvquant"):
            lines += [
                "Which weights RWKVQuant stores how, by its two proxies (seed 0; they see weights alone):",
                "",
                "![proxies of tiny-rwkv's weights](ssm.svg)",
                "",
            ]
    return "\n".join([*lines, *_shapes(found, stale)])


def _shapes(found: Results, stale: set[Cell]) -> list[str]:
    lines = [
        "## Random weights of published shapes",
        "",
        "Whole streamed runs from disk, one block in memory at a time, 8 sequences of 128 random tokens, one thread, other work beside:",
        "`python tools/bench/ssm_shapes.py`. Nothing is said about quality. Peak memory is the kernel's counter, libraries and mapped files",
        "included; anonymous memory was looked at between blocks.",
        "",
        "| | recipe | parameters | bits | seconds | peak GB | anonymous GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, recipe in SHAPES.items():
        cell = next((c for c in found if (c.model, c.label) == ("ssm-shapes", shape)), None)
        if cell is None:
            lines.append(f"| {shape} | {recipe} | missing | – | – | – | – |")
            continue
        row, old = found[cell], " (older code)" if cell in stale else ""
        memory = row["memory"]
        lines.append(
            f"| {shape}{old} | {recipe} | {row['parameters'] / 1e6:.0f} M | {row['bits']:.3f} | {row['seconds']:.0f} "
            f"| {memory['peak_bytes'] / 1e9:.2f} | {memory['anonymous_bytes'] / 1e9:.2f} |"
        )
    return [*lines, ""]


def picture(choices: dict[str, str]) -> None:
    """Every weight of tiny-rwkv at its two proxies, marked by what was chosen."""
    import re

    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qcore"  # the same cells give the same bytes
    from matplotlib import pyplot

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
    figure.savefig(PICTURE, metadata={"Date": None})


def write(cells: Sequence[Cell]) -> None:
    """The page, and the picture where its cell is there."""
    PAGE.write_text(page(cells), encoding="utf-8")
    cell = next(c for c in cells if (c.model, c.label, c.seed) == ("tiny-rwkv", "rwkvquant", 0))
    if cell.file.exists():
        picture(json.loads(cell.file.read_text())["choices"])


def main() -> int:
    def said(result: dict[str, Any]) -> str:
        return f"KL {result['scores']['kl']:.5f}" if "scores" in result else f"{result['seconds']} s"

    return compute(__doc__, matrix(), measure, said, write, ensure_ascii=False)


if __name__ == "__main__":
    raise SystemExit(main())
