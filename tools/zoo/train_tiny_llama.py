"""Train tiny-llama: a transformers ``LlamaForCausalLM`` of 3.4 M parameters on the zoo's text.

Run: ``python tools/zoo/train_tiny_llama.py`` after ``make_text.py``.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import VOCAB_SIZE
from lm import add_arguments, finish_hf, train_hf


def config() -> LlamaConfig:
    """The architecture."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def main() -> None:
    """Train, round, evaluate, install."""
    parser = argparse.ArgumentParser(description=__doc__)
    args = add_arguments(parser, steps=4000, batch=8, peak=2e-3).parse_args()
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config())
    run = train_hf("tiny-llama", model, args)
    finish_hf("tiny-llama", model, args, run)


if __name__ == "__main__":
    main()
