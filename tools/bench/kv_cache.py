"""What a quantized cache of keys and values does to SmolLM2-135M, one JSON file a cell under docs/evidence/kv/, and the table in docs/kv-cache.md.

    python tools/bench/kv_cache.py                compute the cells that are missing, then the table
    python tools/bench/kv_cache.py --only kv2     only cells whose name contains the word
    python tools/bench/kv_cache.py --table        the table from the cells that are there

Small: 8 windows of 512 tokens of news, weights and activations float, no seed (nothing is drawn and nothing is calibrated).  The scores are
teacher-forced, which is what decoding sees: a test holds the two equal.  Bits are those of the cache after one window, its floats counted as 16.  A
cell takes about one minute of a free core.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import evidence
from evidence import CACHE, ROOT, code_files, code_hash, missing

PAGE = ROOT / "docs" / "kv-cache.md"
CELLS = ROOT / "docs" / "evidence" / "kv"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Cell:
    """One policy.  recipe: "" = the float cache"""

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    model: str = "smollm2-135m"
    windows: int = 8
    window: int = 512

    @property
    def name(self) -> str:
        return f"{self.model}/{self.label}"

    @property
    def file(self) -> Path:
        return CELLS / f"{self.name}.json"


def _kivi(bits: int, window: int) -> tuple[str, ...]:
    return tuple(f"rules.{i}.{key}" for i in (0, 1) for key in (f"format.bits={bits}", f"window={window}"))


def matrix() -> list[Cell]:
    """Per token and head at four widths, KIVI at three, and each without the other's window."""
    return [
        Cell("float", ""),
        *(Cell(f"kv{bits}", "kv4", (f"rules.0.format.bits={bits}",)) for bits in (8, 4, 3, 2)),
        Cell("kv4-symmetric", "kv4", ('rules.0.offset="none"',)),
        Cell("kv2-window32", "kv4", ("rules.0.format.bits=2", "rules.0.window=32")),
        *(Cell(f"kivi{bits}-window32", "kv2-kivi", _kivi(bits, 32)) for bits in (4, 3, 2)),
        Cell("kivi2", "kv2-kivi", _kivi(2, 0)),
    ]


def measure(cell: Cell) -> dict[str, Any]:
    """Scores against the float model, and what the cache holds after one window."""
    import news
    import torch
    from qcore.calibration.text import cut, encode
    from qcore.evaluation import LanguageModeling
    from qcore.evaluation.store import Reference
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe
    from qplug_llm.cache import cache_bytes

    registry = load_registry()
    loaded = load_source(f"zoo:{cell.model}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    _, evaluation = news.write(CACHE / "news")
    task = LanguageModeling(cut(encode(loaded.tokenizer, evaluation.read_text(), str(evaluation)), cell.window)[: cell.windows], batch=4)
    place = CACHE / f"reference-{cell.model}-{task.data()[:12]}"
    kept = (place / "reference.json").exists()
    forward = None if kept and cell.recipe else float_forward(loaded, adapter)
    if not kept:
        assert forward is not None
        task.reference(forward, place)
    if cell.recipe:
        quantize_model(loaded, load_recipe(cell.recipe, registry, cell.overrides), registry=registry, adapter=adapter)
    with torch.no_grad():
        cache = loaded.model(task.windows[:1], use_cache=True).past_key_values
        scores = task.evaluate(lambda batch: adapter.outputs(loaded.model, batch), Reference.open(place))
    config = loaded.model.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * cell.window
    files = code_files(cell.recipe)
    stores = [store for layer in cache.layers for store in getattr(layer, "stores", {}).values()]
    floats = sum(s.rest.numel() for s in stores) if stores else values
    packed = cache_bytes(cache) - 4 * floats  # the run is in float32
    return {"code": code_hash(files), "files": files, "scores": scores, "packed_bytes": packed, "floats": floats, "values": values}


def table() -> str:
    """Markdown, from the cells that are there."""
    lines = [
        "| cache | bits per value | perplexity | KL | top-1 | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for cell in matrix():
        if not cell.file.exists():
            continue
        kept = json.loads(cell.file.read_text())
        s, old = kept["scores"], "" if evidence.fresh(kept) else "older code"
        # models are served in 16 bits
        bits = (8 * kept["packed_bytes"] + 16 * kept["floats"]) / kept["values"]
        rest = f"{s['kl']:.4f} ± {s['kl_standard_error']:.4f} | {100 * s['top1']:.1f} %" if cell.recipe else "0 | 100 %"
        lines.append(f"| {cell.label} | {bits:.2f} | {s['perplexity']:.3f} | {rest} | {old} |")
    return "\n".join(lines)


def write_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--table", action="store_true", help="write the table from the cells that are there")
    a = parser.parse_args()
    for cell in [] if a.table else [c for c in missing(matrix()) if a.only in c.name]:
        result = {"cell": asdict(cell), **measure(cell)}
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        cell.file.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        print(f"{cell.name}: KL {result['scores']['kl']:.4f} ppl {result['scores']['perplexity']:.3f}", file=sys.stderr)
    if PAGE.exists():
        write_table()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
