"""The part of training that the transformers language models share: arguments, the loop, rounding, evaluation, installing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from common import (
    DATA,
    TokenBatches,
    command_line,
    evaluate_all,
    evaluate_lm,
    file_table,
    install,
    staging_folder,
    status,
    text_sources,
    train,
    versions,
    write_json,
)


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, batch: int, peak: float) -> argparse.ArgumentParser:
    """The arguments of all language-model scripts, with a script's own defaults."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--lr", type=float, default=peak)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--autocast", choices=("bfloat16", "none"), default="bfloat16")
    return parser


def train_lm(
    name: str,
    model: torch.nn.Module,
    args: argparse.Namespace,
    logits_and_extra: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
) -> dict[str, Any]:
    """Train a language model given a function from tokens to logits and an additional loss (or None)."""
    torch.set_num_threads(args.threads)
    batches = TokenBatches(args.context, args.batch, args.seed)

    def loss_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.from_numpy(batches[step])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast == "bfloat16"):
            logits, extra = logits_and_extra(tokens[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        return (loss if extra is None else loss + extra), loss

    run = train(name, model, loss_of, steps=args.steps, peak=args.lr, warmup=args.warmup, weight_decay=args.weight_decay)
    return run | {
        "tokens_seen": args.steps * args.batch * args.context,
        "tokens_in_train_split": len(batches.stream),
        "compute": "float32 weights, bfloat16 autocast" if args.autocast == "bfloat16" else "float32",
    }


def train_hf(name: str, model: torch.nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Train a transformers causal language model on its logits alone."""
    return train_lm(name, model, args, lambda tokens: (model(input_ids=tokens, use_cache=False).logits, None))


def record_of(model: torch.nn.Module, name: str, args: argparse.Namespace, run: dict[str, Any]) -> dict[str, Any]:
    """The training record but for the evaluation."""
    return {
        "name": name,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": command_line(),
        "arguments": vars(args),
        **run,
        "data": {"text": "train split of the zoo's text (see text/SOURCES.json)", "sources": text_sources()},
        "weights_dtype": "bfloat16 (rounded to nearest from float32 after training; the evaluation is of the rounded weights)",
        "versions": versions("torch", "transformers", "tokenizers", "safetensors", "numpy"),
    }


def finish_hf(
    name: str,
    model: torch.nn.Module,
    args: argparse.Namespace,
    run: dict[str, Any],
    more: Callable[[torch.nn.Module], dict[str, Any]] | None = None,
    during_evaluation: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Round to bfloat16, save with transformers, load back, evaluate, write the record, install.

    ``more`` may add entries to the record; it is given the loaded model (float32 compute on the rounded weights).
    ``during_evaluation`` makes the context in which the model is evaluated.
    """
    from transformers import AutoModelForCausalLM

    text = (DATA / "text/eval.txt").read_text("utf-8")
    with during_evaluation():
        before = evaluate_lm(lambda tokens: model(input_ids=tokens, use_cache=False).logits, text)
    record = record_of(model, name, args, run)
    folder = staging_folder(name)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with during_evaluation():
        record["evaluation"] = evaluate_all(lambda tokens: loaded(input_ids=tokens, use_cache=False).logits)
    record["evaluation_before_rounding"] = before
    if more is not None:
        record |= more(loaded)
    finish(folder, name, record)


def finish(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write the record, install the folder and say so."""
    record["files"] = file_table(folder)
    write_json(folder / "record.json", record)
    target = install(folder, name)
    size = sum(p.stat().st_size for p in target.iterdir())
    status(
        f"{name} finished: {record['parameters']} parameters, eval {record['evaluation']['eval']}, {record['seconds']} s, "
        f"{size} bytes in {target.relative_to(DATA.parent)}"
    )
