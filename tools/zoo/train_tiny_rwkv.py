"""Train tiny-rwkv: RWKV-7 (rwkv7.py) on the zoo's text.

After training, the logits of the chunked form are compared with those of the token-by-token reference.

Run: ``python tools/zoo/train_tiny_rwkv.py`` after ``make_text.py``.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from common import DATA, WORK, evaluate_all, evaluate_lm, staging_folder, write_json
from lm import add_arguments, finish, record_of, train_lm
from rwkv7 import RWKV7, RWKV7Config


def compare_forms(model: RWKV7) -> dict[str, Any]:
    """Largest difference of the logits: token-by-token reference against chunked form, on evaluation tokens."""
    tokens = torch.from_numpy(np.load(WORK / "eval.npy")[: 8 * 256].astype(np.int64).reshape(8, 256))
    with torch.no_grad():
        chunked = model(tokens)
        state, steps = model.empty_state(len(tokens)), []
        for t in range(tokens.shape[1]):
            logits, state = model.step(tokens[:, t], state)
            steps.append(logits)
    expected = torch.stack(steps, dim=1)
    return {
        "tokens": tokens.numel(),
        "max_abs_diff_of_logits": float((expected - chunked).abs().max()),
        "max_abs_logit": round(float(expected.abs().max()), 4),
    }


def main() -> None:
    """Train, round, compare, evaluate, install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = add_arguments(parser, steps=1800, batch=8, peak=1.5e-3).parse_args()
    torch.manual_seed(args.seed)
    model = RWKV7(RWKV7Config())
    run = train_lm("tiny-rwkv", model, args, lambda tokens: (model(tokens), None))

    before = evaluate_lm(model, (DATA / "text/eval.txt").read_text("utf-8"))
    folder = staging_folder("tiny-rwkv")
    write_json(folder / "config.json", model.config_json())
    rounded = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = RWKV7.from_folder(folder)
    record = record_of(loaded, "tiny-rwkv", args, run)
    record["evaluation"] = evaluate_all(loaded)
    record["evaluation_before_rounding"] = before
    record["chunked_form_against_token_by_token"] = compare_forms(loaded)
    finish(folder, "tiny-rwkv", record)


if __name__ == "__main__":
    main()
