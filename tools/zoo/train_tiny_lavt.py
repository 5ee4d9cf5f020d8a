"""Train tiny-lavt: LAVT ("lavt_one") with a narrow Swin and a two-layer BERT, on generated pictures of coloured shapes.

Run: ``python tools/zoo/train_tiny_lavt.py`` (needs qplug-segmentation, whose model and pictures these are, with timm and transformers).
About five minutes of one core. Weights are stored as float16 and read as float32, so that the folder stays below 4 MB.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from qplug_segmentation.lavt import Lavt, LavtConfig
from qplug_segmentation.metrics import Masks
from qplug_segmentation.shapes import WORDS, Shapes, make
from qplug_segmentation.triples import SentenceEncoder, Triples, model_batch, model_batches
from safetensors.torch import load_file, save_file
from torch.nn import functional

from common import command_line, file_table, install, staging_folder, status, train, versions, write_json

TOKENS = 12
CONFIG: dict[str, Any] = {
    "architecture": "lavt_one",
    "lavt": {
        "embed": 24,
        "depths": [2, 2, 2, 1],
        "heads": [2, 4, 8, 16],
        "window": 4,
        "patch": 4,
        "decoder": 48,
        "bert": {
            "vocab_size": len(WORDS),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "max_position_embeddings": 32,
        },
    },
    "image": {"side": 64},
    "tokens": TOKENS,
    "shapes": {"seed": 0, "calibration": 256, "evaluation": 250},
}


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, the object weighing twice, plus one minus the soft Dice score: objects cover 4 % of a picture."""
    weight = torch.tensor([1.0, 2.0])
    own = functional.cross_entropy(logits, target.long(), weight)
    p = logits.softmax(1)[:, 1]
    dice = (2 * (p * target).sum((1, 2)) + 1) / (p.sum((1, 2)) + target.sum((1, 2)) + 1)
    return own + 0.5 * (1 - dice.mean())


@torch.no_grad()
def judge(model: Lavt, triples: Triples, encode: SentenceEncoder) -> dict[str, float]:
    """The scores on some triples."""
    masks = Masks()
    for batch in model_batches(triples, encode, 32):
        masks.add(model(batch["image"], batch["ids"], batch["words"]).argmax(1) == 1, batch["target"])
    return {name: round(value, 4) for name, value in masks.scores().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)

    folder = staging_folder("tiny-lavt", with_tokenizer=False)
    write_json(folder / "config.json", CONFIG)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", "utf-8")
    encode = SentenceEncoder(folder / "vocab.txt", TOKENS)
    model = Lavt(LavtConfig.from_dict(CONFIG["lavt"]))

    def batch_loss(step: int) -> torch.Tensor:
        # calibration pictures are the first of the split: training begins with them
        triples = make("train", range(step * args.batch // 2, (step + 1) * args.batch // 2))
        batch = model_batch(triples, encode)
        return loss_of(model(batch["image"], batch["ids"], batch["words"]), batch["target"])

    began = time.process_time()
    run = train(
        "tiny-lavt", model, batch_loss, steps=args.steps, peak=args.lr, warmup=args.warmup, weight_decay=args.weight_decay,
        checkpoint_every=400,
    )  # fmt: skip
    cpu = time.process_time() - began

    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    loaded = Lavt(LavtConfig.from_dict(json.loads((folder / "config.json").read_text("utf-8"))["lavt"])).eval()
    stored = load_file(folder / "model.safetensors")
    loaded.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.items()})
    held_out = Shapes("val", CONFIG["shapes"]["evaluation"], CONFIG["shapes"]["seed"]).read()
    record = {
        "name": "tiny-lavt",
        "architecture": CONFIG["architecture"],
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "command": command_line(),
        "arguments": vars(args),
        "compute": "float32",
        "cpu_seconds": round(cpu, 1),
        "pictures_seen": args.steps * args.batch // 2,
        "sentences_seen": args.steps * args.batch,
        **run,
        "data": {"source": "generated: qplug_segmentation.shapes", "licence": "Apache-2.0", "split": "train, pictures by number"},
        "weights_dtype": "float16, read as float32",
        "evaluation": {"val": judge(loaded, held_out, encode), "sentences": len(held_out)},
        "versions": versions("torch", "timm", "transformers", "safetensors", "numpy"),
        "files": file_table(folder),
    }
    write_json(folder / "record.json", record)
    target = install(folder, "tiny-lavt")
    size = sum(p.stat().st_size for p in target.iterdir())
    status(f"tiny-lavt finished: {record['parameters']} parameters, {record['evaluation']}, {record['seconds']} s, {size} bytes")


if __name__ == "__main__":
    main()
