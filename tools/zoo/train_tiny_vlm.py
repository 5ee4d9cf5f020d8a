"""Train tiny-llava: a LLaVA of 0.5 million parameters that answers questions about drawn shapes.

    python tools/zoo/train_tiny_vlm.py

transformers' own LlavaForConditionalGeneration: a CLIP vision tower of 2 layers (d = 64, 16 patches of a 32 × 32 picture), the projector,
a Llama of 2 layers (d = 128).  Trained from scratch on pictures that are drawn anew for every step (`qplug_multimodal.scenes`, even
seeds); no data is downloaded. Writes config.json, model.safetensors and record.json (losses, accuracy on evaluation pictures).
What a step sees depends on the step only.  Five to seven minutes of one core.
"""

import argparse
import json
from pathlib import Path

import torch
from qplug_multimodal.scenes import EVALUATION, ID, TRAIN, WORDS, Dialogue, dialogues
from torch import nn
from torch.nn import functional as F

from common import ROOT, command_line, train, versions, write_json

OUT = ROOT / "packages/qplug-multimodal/src/qplug_multimodal/data/tiny-llava"


def tiny_config() -> object:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(WORDS),
        max_position_embeddings=256, pad_token_id=ID["<pad>"], bos_token_id=ID["<bos>"], eos_token_id=ID["<eos>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=ID["<image>"], vision_feature_layer=-1, tie_word_embeddings=False,
        vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip


def loss_of(model: nn.Module, d: Dialogue, text_weight: float = 0.05) -> torch.Tensor:
    """Cross-entropy of answers, and a little of the other words."""
    logits = model(input_ids=d.input_ids, pixel_values=d.pixel_values, use_cache=False).logits[:, :-1]
    targets, answers = d.input_ids[:, 1:], d.answers[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    spoken = (targets != ID["<image>"]) & ~answers
    return each[answers].mean() + text_weight * each[spoken].mean()


@torch.no_grad()
def accuracy(model: nn.Module, n: int, seed: int) -> float:
    """Share of right answers, the question and all turns before it given."""
    d = dialogues(n, seed)
    logits = model.eval()(input_ids=d.input_ids, pixel_values=d.pixel_values, use_cache=False).logits[:, :-1]
    where = d.answers[:, 1:]
    return float((logits.argmax(-1)[where] == d.input_ids[:, 1:][where]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(a.seed)
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration(tiny_config())
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=min(0.08, p[0].numel() ** -0.5))

    def batch_loss(step: int) -> torch.Tensor:
        # training pictures have even seeds; those of calibration come before the first
        return loss_of(model, dialogues(a.batch, TRAIN + 2 * (1000 + step)))

    run = train(
        "tiny-llava", model, batch_loss, steps=a.steps, peak=a.lr, warmup=50, weight_decay=0.01, betas=(0.9, 0.98),
        checkpoint_every=1000,
    )  # fmt: skip
    a.out.mkdir(parents=True, exist_ok=True)
    found = accuracy(model, 1000, EVALUATION)
    model.eval().save_pretrained(a.out)
    record = {
        "command": command_line(),
        "seed": a.seed,
        "steps": a.steps,
        "batch": a.batch,
        "threads": 1,
        "parameters": sum(p.numel() for p in model.parameters()),
        **run,
        "accuracy on 1000 evaluation pictures, 4 questions each": round(found, 4),
        "versions": versions("torch", "transformers"),
    }
    write_json(a.out / "record.json", record)
    (a.out / "words.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
