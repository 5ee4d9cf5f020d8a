"""The evidence for GSQ-Tuning: what integer products cost a fine-tuning of tiny-llama on text of a kind it never saw, one JSON file a cell.

    python tools/bench/evidence_gsq.py            compute the cells that are missing, then docs/evidence/gsq.md
    python tools/bench/evidence_gsq.py --list     say which are missing, and compute nothing
    python tools/bench/evidence_gsq.py --table    write the page from the cells that are there

A cell is one run of `qcore tune`, in a process of its own: 8 to 20 seconds of one core, a gigabyte of memory; all 18 take about five minutes of
computing.  The text is C++: the headers under torch/include/c10 of the torch that is installed (tiny-llama was trained on English and
Python).  Files are split by the hash of their names, a third of them held out; training takes the first 200,000 characters, evaluation the first
80,000.  Their sha256 stand in every cell: another release of torch is another text.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
from cells import compute, in_a_process
from evidence import CACHE, ROOT, code_files, code_hash

SEEDS = 3
PAGE = ROOT / "docs" / "evidence" / "gsq.md"
READING = ROOT / "tools" / "bench" / "gsq_reading.md"
RECIPES = "packages/qplug-llm/src/qplug_llm/gsq/recipes"
OWN = ("packages/qcore/src/qcore/training", "packages/qplug-hardware/src/qplug_hardware")


@dataclass(frozen=True)
class Cell(evidence.Cell):
    """windows × window tokens of evaluation; steps of `batch` windows, adapters of `rank`"""

    text: str = "c10-headers"
    windows: int = 8
    window: int = 128
    steps: int = 30
    batch: int = 2
    rank: int = 32
    rate: float = 0.002

    @property
    def name(self) -> str:
        return f"{self.model}/tune/{self.label}-seed{self.seed}"


# recipe → what it is
METHODS = {
    "lora-float": "LoRA, everything float",
    "qlora-nf4": "NF4 weights, everything else float (QLoRA)",
    "gsq-w8a8g8": "8-8-8",
    "gsq-w4a8g8": "4-8-8",
    "gsq-w4a6g6": "4-6-6",
    "gsq-w4a5g5": "4-5-5",
}


def matrix() -> list[Cell]:
    return [Cell("tiny-llama", recipe, recipe, seed=seed) for seed in range(SEEDS) for recipe in METHODS]


def text() -> tuple[Path, Path]:
    """Training and held-out text, as files."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent / "include" / "c10"
    parts: dict[bool, list[str]] = {True: [], False: []}
    for file in sorted(root.rglob("*.h")):
        name = file.relative_to(root).as_posix()
        parts[hashlib.sha256(name.encode()).digest()[0] % 3 == 0].append(file.read_text(encoding="utf-8"))
    folder = CACHE / "c10-headers"
    folder.mkdir(parents=True, exist_ok=True)
    for held, size in ((False, 200_000), (True, 80_000)):
        part = folder / f".{held}.part"
        part.write_text("\n".join(parts[held])[:size], encoding="utf-8")
        part.replace(folder / ("held-out.txt" if held else "train.txt"))
    return folder / "train.txt", folder / "held-out.txt"


def measure(cell: Cell) -> dict[str, Any]:
    """One run of `qcore tune`; its record, without the recipe's text and all but the ends of the losses."""
    import torch
    from qplug_llm.gsq.run import Job, execute, prepare

    train, held_out = text()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            uri=f"zoo:{cell.model}",
            recipe=(ROOT / RECIPES / f"{cell.recipe}.toml").as_posix(),
            data=train,
            evaluation=held_out,
            out=Path(folder) / "out",
            rank=cell.rank,
            alpha=float(cell.rank),
            steps=cell.steps,
            batch=cell.batch,
            rate=cell.rate,
            window=cell.window,
            eval_tokens=cell.windows * cell.window,
            seed=cell.seed,
            hold=True,
        )
        started = time.process_time()
        record = execute(job, prepare(job), lambda phase, done, total: None)
        seconds = time.process_time() - started
        weights = sum(f.stat().st_size for f in (Path(folder) / "out").glob("base/*.safetensors"))
    losses = record.pop("losses")
    record.pop("recipe")
    files = sorted(code_files(cell.recipe) + own_files(cell.recipe))
    return {
        **record,
        "losses": {"first": mean(losses[:5]), "last": mean(losses[-5:])},
        "cpu_seconds": round(seconds, 1),
        "base_bytes": weights or None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "files": files,
        "code": code_hash(files),
    }


def own_files(recipe: str) -> list[str]:
    """What decides these numbers besides the rooms of `evidence.py`."""
    inside = tuple((ROOT / place).as_posix() for place in OWN)
    loaded = {Path(m.__file__).as_posix() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    return [Path(f).relative_to(ROOT).as_posix() for f in loaded if f.startswith(inside)] + [f"{RECIPES}/{recipe}.toml"]


def page(cells: Sequence[Cell]) -> str:
    """The table, from the cells that are there."""
    first = cells[0]
    lines = [
        "# GSQ-Tuning: fine-tuning with integer products, on tiny-llama",
        "",
        "`python tools/bench/evidence_gsq.py` made this page; one JSON file a cell lies in `cells/tiny-llama/tune/`.",
        "Model: `zoo:tiny-llama`, trained on English and Python. Text: C++, the c10 headers of torch; the held-out text is other files of them.",
        f"{first.steps} steps of {first.batch} windows of {first.window} tokens, rank {first.rank}, AdamW with float32 moments, "
        f"learning rate {first.rate:g} falling as a cosine: a short run, for the order of the methods and not for what tuning can reach. "
        "The rate was set once, before any run, and is the same for all.",
        f"Perplexity on {first.windows} windows of {first.window} held-out tokens; means over the seeds, ± their standard deviation. "
        "A seed draws the adapters and the order of the text.",
        "`in its numbers`: products as in training. `in float`: the same weights and adapters, float products, as other programs run them.",
        "`kept`: what adapted layers keep of their inputs for the backward pass, measured, a token. Float is float32 here; bfloat16 would be half.",
        "",
        "| recipe | | seeds | not tuned, in its numbers | tuned, in its numbers | tuned, in float | kept, bytes a token | all-zero groups of dY |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe, words in METHODS.items():
        own = [json.loads(c.file.read_text()) for c in cells if c.recipe == recipe and c.file.exists()]
        if own:
            kept = own[0]["kept_for_backward"]
            zero = mean(o["all_zero_gradient_groups"].get("dY along out", 0.0) for o in own)
            row = (
                f"`{recipe}`",
                words,
                str(len(own)),
                *(_spread([o["perplexity"][k] for o in own]) for k in ("before_coded", "after_coded", "after_float")),
                f"{kept['adapted_layers'] / kept['tokens']:,.0f}",
                f"{100 * zero:.2f} %" if recipe.startswith("gsq") else "–",
            )
            lines.append(f"| {' | '.join(row)} |")
    there = [json.loads(c.file.read_text()) for c in cells if c.file.exists()]
    if there:
        whole = {o["kept_for_backward"]["whole_model"] // o["kept_for_backward"]["tokens"] for o in there}
        lines += [
            "",
            f"The float model, not tuned: {there[0]['perplexity']['float']:.3f}. The whole model, with norms, attention and nonlinearities ",
        ]
        lines[-1] += f"(always float32), keeps {min(whole):,} to {max(whole):,} bytes a token."
    reading = READING.read_text(encoding="utf-8").rstrip() if READING.exists() else ""
    return "\n".join([*lines, "", reading]).rstrip() + "\n"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 and stdev(values) > 0 else "")


def main() -> int:
    if "--cell" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--cell", required=True)
        data = json.loads(parser.parse_args().cell)
        print(json.dumps(measure(Cell(**{**data, "overrides": tuple(data["overrides"])}))))
        return 0

    def said(result: dict[str, Any]) -> str:
        p = result["perplexity"]
        return f"{p['before_coded']:.3f} -> {p['after_coded']:.3f}, {result['cpu_seconds']} s of computing"

    return compute(__doc__, matrix(), lambda c: in_a_process(__file__, c), said, lambda cells: PAGE.write_text(page(cells), encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
