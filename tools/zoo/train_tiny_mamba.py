"""Train tiny-mamba: a transformers ``MambaForCausalLM`` on the zoo's text, with the zoo's own scan (mamba_scan.py).

After training, the logits of the saved model under transformers' own loop are compared with those under the training scan.

Run: ``python tools/zoo/train_tiny_mamba.py`` after ``make_text.py``.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from transformers import MambaConfig, MambaForCausalLM

from common import VOCAB_SIZE, WORK
from lm import add_arguments, finish_hf, train_hf
from mamba_scan import fast_scan


def config() -> MambaConfig:
    """The architecture."""
    return MambaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        state_size=16,
        num_hidden_layers=4,
        expand=2,
        conv_kernel=4,
        initializer_range=0.02,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )


def compare_scans(model: torch.nn.Module) -> dict[str, Any]:
    """Largest difference of the logits: transformers' loop over time against the training scan, on evaluation tokens.

    The evaluation itself uses the training scan; this is what allows it.
    """
    tokens = torch.from_numpy(np.load(WORK / "eval.npy")[: 8 * 256].astype(np.int64).reshape(8, 256))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        with fast_scan():
            got = model(input_ids=tokens, use_cache=False).logits
    return {
        "training_scan_against_transformers": {
            "tokens": tokens.numel(),
            "max_abs_diff_of_logits": float((expected - got).abs().max()),
            "max_abs_logit": round(float(expected.abs().max()), 4),
        }
    }


def main() -> None:
    """Train, round, compare, evaluate, install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = add_arguments(parser, steps=1800, batch=8, peak=2e-3).parse_args()
    torch.manual_seed(args.seed)
    model = MambaForCausalLM(config())
    with fast_scan():
        run = train_hf("tiny-mamba", model, args)
    finish_hf("tiny-mamba", model, args, run, compare_scans, fast_scan)


if __name__ == "__main__":
    main()
