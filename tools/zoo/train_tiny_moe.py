"""Train tiny-moe: a transformers ``MixtralForCausalLM``, 8 experts, top 2, 4.2 M parameters, on the zoo's text.

The load-balancing loss is light, so that the domains of the text keep favourite experts.

Run: ``python tools/zoo/train_tiny_moe.py`` after ``make_text.py``.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from common import DATA, VOCAB_SIZE, stream_batches
from lm import add_arguments, finish_hf, train_lm


def config() -> MixtralConfig:
    """The architecture."""
    return MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=1e-3,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def routing_counts(model: torch.nn.Module, text: str, context: int = 256) -> list[list[int]]:
    """Tokens sent to each expert, [layer][expert]; every token counts ``num_experts_per_tok`` times a layer."""
    stream = np.array(Tokenizer.from_file(str(DATA / "text/tokenizer.json")).encode(text).ids)
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts, dtype=torch.int64)
    with torch.no_grad():
        for window in stream_batches(stream, context, 8):
            output = model(input_ids=torch.from_numpy(window[:, :-1]), use_cache=False, output_router_logits=True)
            for layer, logits in enumerate(output.router_logits):
                chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten()
                counts[layer] += torch.bincount(chosen, minlength=counts.shape[1])
    return counts.tolist()


def routing(model: torch.nn.Module) -> dict[str, Any]:
    """The record of the routing on the calibration text and on each domain's evaluation text."""
    folder = DATA / "text"
    names = ["calib", *sorted(path.stem for path in folder.glob("eval_*.txt"))]
    return {"tokens_per_expert": {name: routing_counts(model, (folder / f"{name}.txt").read_text("utf-8")) for name in names}}


def main() -> None:
    """Train, round, evaluate, count the routing, install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = add_arguments(parser, steps=2000, batch=8, peak=2e-3).parse_args()
    torch.manual_seed(args.seed)
    model = MixtralForCausalLM(config())

    def logits_and_aux(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(input_ids=tokens, use_cache=False, output_router_logits=True)
        return output.logits, model.config.router_aux_loss_coef * output.aux_loss

    run = train_lm("tiny-moe", model, args, logits_and_aux)
    finish_hf("tiny-moe", model, args, run, routing)


if __name__ == "__main__":
    main()
