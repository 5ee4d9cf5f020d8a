"""Train tiny-llava: a LLaVA of 0.5 million parameters that answers questions about drawn shapes.

    python tools/zoo/train_tiny_vlm.py --out packages/qplug-multimodal/src/qplug_multimodal/data/tiny-llava

transformers' own LlavaForConditionalGeneration: a CLIP vision tower of 2 layers (d = 64, 16 patches of a 32 × 32 picture), the projector,
a Llama of 2 layers (d = 128).  Trained from scratch on pictures that are drawn anew for every step (`qplug_multimodal.scenes`, even
seeds); no data is downloaded. Writes config.json, model.safetensors and record.json (steps, losses, accuracy on evaluation pictures).
Seven minutes of one core.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from qplug_multimodal.scenes import EVALUATION, ID, TRAIN, WORDS, Dialogue, dialogues
from torch import nn
from torch.nn import functional as F


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


def train(out: Path, seconds: float, batch: int, rate: float) -> None:
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration(tiny_config())
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=min(0.08, p[0].numel() ** -0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    started, cpu, step, seen = time.time(), time.process_time, 0, []
    begin = cpu()
    while (used := cpu() - begin) < seconds:
        # linear warm-up, then a cosine over the CPU time that is granted
        share = used / seconds
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        model.train()
        loss = loss_of(model, dialogues(batch, TRAIN + 2 * (1000 + step)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            seen.append((step, round(loss.item(), 4)))
            print(f"step {step}  loss {loss.item():.4f}  accuracy {accuracy(model, 100, EVALUATION):.3f}  cpu {used:.0f} s", flush=True)
        step += 1
    out.mkdir(parents=True, exist_ok=True)
    found = accuracy(model, 1000, EVALUATION)
    model.eval().save_pretrained(out)
    record = {
        "made by": "tools/zoo/train_tiny_vlm.py",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "batch": batch,
        "learning rate": rate,
        "cpu seconds": round(cpu() - begin),
        "seconds": round(time.time() - started),
        "losses": seen,
        "accuracy on 1000 evaluation pictures, 4 questions each": round(found, 4),
        "torch": torch.__version__,
        "seed": 0,
    }
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "words.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420.0, help="of CPU time")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    a = parser.parse_args()
    train(a.out, a.seconds, a.batch, a.rate)
