"""The evidence for mixtures of experts: what balanced text (EBSS) and the router's affinity (AGQ) do to tiny-moe, one JSON file a cell.

    python tools/bench/evidence_moe.py            compute the cells that are missing, then docs/evidence/moe.md
    python tools/bench/evidence_moe.py --list     say which are missing, and compute nothing
    python tools/bench/evidence_moe.py --table    write the page from the cells that are there

As `evidence.py`, whose cells stand beside these: the same key, the same scores; all in one process, for a cell takes seconds.  Calibration is 64
windows of 256 tokens: of one domain (the model's own calibration text holds five; the King James Bible is told by its numbered verses), of all five,
or sampled by EBSS from the float model.  Evaluation is 64 windows of the evaluation text of all five domains.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
from cells import compute
from evidence import CACHE, ROOT

SEEDS = 5
PAGE = ROOT / "docs" / "evidence" / "moe.md"
_PLAIN = "calibration.affinity=0.0"


@dataclass(frozen=True)
class Cell(evidence.Cell):
    """text: "scripture", "mixed" or "ebss" """

    samples: int = 64
    length: int = 256
    windows: int = 64
    window: int = 256


# label → (recipe, text, overrides, what it is)
METHODS = {
    "rtn": ("w4a16-rtn", "scripture", (), "round to nearest, scales searched; no data"),
    "awq": ("w4a16-moequant-awq", "scripture", (_PLAIN,), "AWQ on one domain"),
    "moequant+": ("w4a16-moequant-awq", "ebss", (), "MoEQuant⁺: AWQ, EBSS, AGQ"),
    "gptq": ("w4a16-moequant", "scripture", (_PLAIN,), "GPTQ on one domain"),
    "gptq-agq": ("w4a16-moequant", "scripture", (), "and AGQ"),
    "gptq-ebss": ("w4a16-moequant", "ebss", (_PLAIN,), "and EBSS"),
    "moequant++": ("w4a16-moequant", "ebss", (), "MoEQuant⁺⁺: both"),
    "gptq-mixed": ("w4a16-moequant", "mixed", (_PLAIN,), "GPTQ on text of all five domains"),
}


def matrix() -> list[Cell]:
    """W4 and W3, every method over five seeds; the one that needs no data once."""
    return [
        Cell("tiny-moe", f"w{bits}-{label}", recipe, (f"rules.0.format.bits={bits}", *extra), seed=seed, text=text)
        for seed in range(SEEDS)
        for bits in (3, 4)
        for label, (recipe, text, extra, _) in METHODS.items()
        if seed == 0 or label != "rtn"
    ]


def scripture(text: str) -> str:
    """The pieces of the calibration text that are chapters of the Bible: four of five of their lines begin with a verse's number."""
    pieces = text.split("<|endoftext|>")
    numbered = [p for p in pieces if sum(bool(re.match(r"\d+ ", line)) for line in p.splitlines()) > 0.8 * len(p.splitlines())]
    return "<|endoftext|>".join(numbered)


def windows_of(cell: Cell, loaded: Any, adapter: Any) -> Any:
    """The calibration windows of a cell, [samples, length]."""
    from qcore.calibration.text import TextFile
    from qcore.pipeline import float_forward
    from qcore.recipe import CalibrationSettings
    from qplug_llm.ebss import EBSS

    settings = CalibrationSettings(samples=cell.samples, length=cell.length, seed=cell.seed)
    if cell.text == "ebss":
        source = EBSS(path=str(CACHE / f"ebss-{cell.model}-seed{cell.seed}.safetensors"))
        made = source.kept(loaded.model, settings)
        if made is None:
            float_forward(loaded, adapter)
            made = source.windows(loaded.model, settings, None, lambda phase, done, total: None)
        return made
    file = loaded.calibration
    if cell.text == "scripture":
        file = CACHE / "scripture.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(scripture(loaded.calibration.read_text(encoding="utf-8")), encoding="utf-8")
        part.replace(file)
    return TextFile(file).windows(loaded.tokenizer, settings)


def measure(cell: Cell) -> dict[str, Any]:
    """Quantize, save, load again, and compare with the float model."""
    import torch
    from qcore.calibration.text import cut, data_hash, encode, start_batches, to_batches
    from qcore.checkpoint import load, save
    from qcore.evaluation import LanguageModeling
    from qcore.evaluation.store import Reference
    from qcore.model import adapter_for, load_source
    from qcore.modules import serve_in
    from qcore.pipeline import compute_dtype, float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    registry = load_registry()
    loaded = load_source(f"zoo:{cell.model}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    assert loaded.calibration is not None and loaded.evaluation is not None
    started = time.perf_counter()
    windows = windows_of(cell, loaded, adapter)
    sampled = time.perf_counter() - started
    ids = encode(loaded.tokenizer, loaded.evaluation.read_text(encoding="utf-8"), str(loaded.evaluation))
    task = LanguageModeling(cut(ids, cell.window)[: cell.windows], batch=8)
    place = CACHE / f"reference-{cell.model}-{task.data()[:12]}"
    kept = (place / "reference.json").exists()
    reference = Reference.open(place) if kept else task.reference(float_forward(loaded, adapter), place)
    recipe = load_recipe(cell.recipe, registry, cell.overrides)
    starts = start_batches(windows, recipe.calibration.starts, recipe.calibration.starts_weight, cell.seed)
    started = time.perf_counter()
    q = quantize_model(loaded, recipe, to_batches(windows, 8) + starts, registry=registry, adapter=adapter)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        serve_in(q.model, loaded.dtype)
        save(q.model, out, registry=registry, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
        model = load(out, registry=registry)
        serve_in(model, compute_dtype(loaded.dtype))
        scores = task.evaluate(lambda batch: adapter.outputs(model, batch), reference)
    weights = sum(r.shape[0] * r.shape[1] for r in q.sites)
    stacks = q.coverage.to_dict()["stacks"]
    rows = [n for stack in stacks.values() for n in next(iter(stack.values()))["rows"]]
    return {
        "scores": scores,
        "bits": sum(8 * r.nbytes for r in q.sites) / weights,
        "seconds": round(seconds, 1),
        "sampling_seconds": round(sampled, 1),
        "threads": torch.get_num_threads(),
        "recipe": recipe.name,
        "solver": repr(recipe.solver),
        "calibration_sha256": data_hash(windows),
        "fewest_rows": min(rows, default=None),
        "most_rows": max(rows, default=None),
        "mean_error": sum(r.error for r in q.sites) / len(q.sites),
    }


# of the 72 cells; what the figures say, and no more
READING = (
    "## Reading",
    "",
    "- GPTQ has half the divergence of AWQ, and a half to a third of that of rounding to nearest; no part of MoEQuant comes near that step.",
    "- AGQ brings nothing at 4 bits (0.0024 and 0.0024) and 3 % at 3 bits (0.0093 to 0.0090, one and a half standard deviations).",
    "- EBSS does not help on this model: its text, sampled from the model itself, calibrates worse than the one domain it is compared with",
    "  (0.0024 to 0.0028 and 0.0093 to 0.0103), though its experts are used more evenly. AWQ does not tell the two apart.",
    "- What helps is text of all the domains that the model is judged on: a fifth to a quarter less divergence than one domain. Where such text is",
    "  to be had, it is the better answer to experts that one domain leaves idle.",
    "- The perplexities of the GPTQ rows on one domain or on EBSS lie within two standard deviations: differences are in the divergence.",
)


def page(cells: Sequence[Cell]) -> str:
    """The table, from the cells that are there."""
    lines = [
        "# Mixtures of experts: what MoEQuant's two parts do to tiny-moe",
        "",
        "`python tools/bench/evidence_moe.py` made this page; one JSON file a cell lies in `cells/tiny-moe/`.",
        "Model: `zoo:tiny-moe`, a trained Mixtral of 4 layers, 8 experts, top 2.",
        "Calibration: 64 windows of 256 tokens, of one domain (the King James Bible) unless a row says otherwise.",
        "Evaluation: 64 windows of 256 tokens of text of all five domains.",
        "Figures are means over the seeds that were run, ± their standard deviation.",
        "Groups of 64; routers 8 bits, but float where no data is needed.  Expert rows: the fewest and the most that one expert saw.",
        "",
    ]
    for bits in (4, 3):
        lines += [
            f"## {bits} bits",
            "",
            "| method | | seeds | KL to the float model | perplexity | top-1 agreement | expert rows |",
            "|---|---|---|---|---|---|---|",
        ]
        for label, (_, _, _, words) in METHODS.items():
            own = [json.loads(c.file.read_text()) for c in cells if c.label == f"w{bits}-{label}" and c.file.exists()]
            if own:
                fewest, most = min(o["fewest_rows"] or 0 for o in own), max(o["most_rows"] or 0 for o in own)
                rows = f"{fewest} to {most}" if most else "–"
                scores = (_spread(own, "kl", 4), _spread(own, "perplexity", 3), f"{_spread(own, 'top1', 2, 100)} %")
                lines.append(f"| {' | '.join((f'`{label}`', words, str(len(own)), *scores, rows))} |")
        first = next((c for c in cells if c.file.exists()), None)
        if first is not None:
            lines += ["", f"Float perplexity: {json.loads(first.file.read_text())['scores']['perplexity_reference']:.3f}.", ""]
    return "\n".join([*lines, *READING, ""])


def _spread(own: Sequence[dict[str, Any]], score: str, digits: int, factor: float = 1.0) -> str:
    values = [factor * o["scores"][score] for o in own]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> int:
    def said(result: dict[str, Any]) -> str:
        return f"KL {result['scores']['kl']:.4f} ppl {result['scores']['perplexity']:.2f}"

    return compute(__doc__, matrix(), measure, said, lambda cells: PAGE.write_text(page(cells), encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
