"""What the zoo's training scripts share: paths, token batches, the learning-rate schedule, checkpoints, records."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parents[1]
DATA = ROOT / "packages/qzoo/src/qzoo/data"
WORK = Path(os.environ.get("ZOO_WORK", TOOLS / ".work"))
WORK.mkdir(parents=True, exist_ok=True)

EOT = "<|endoftext|>"
VOCAB_SIZE = 1024


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    return sha256_bytes(path.read_bytes())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)


def status(line: str) -> None:
    """Append a line to the status file that the people waiting for the queue read."""
    with (WORK / "status.txt").open("a", encoding="utf-8") as stream:
        stream.write(f"{time.strftime('%FT%TZ', time.gmtime())} {line}\n")


def command_line() -> str:
    """The command as to be typed at the repository's root."""
    script = Path(sys.argv[0]).resolve()
    return " ".join(["python", script.relative_to(ROOT).as_posix(), *sys.argv[1:]])


def versions(*modules: str) -> dict[str, str]:
    """Versions of Python and of the named modules."""
    return {"python": platform.python_version()} | {name: str(__import__(name).__version__) for name in modules}


def text_sources() -> list[dict[str, Any]]:
    """The text sources of SOURCES.json, in short."""
    sources = json.loads((DATA / "text/SOURCES.json").read_text("utf-8"))["sources"]
    return [
        {
            "domain": source["domain"],
            "packages": {name: package["version"] for name, package in source["packages"].items()},
            "licence": source["licence"],
            "train_bytes": source["train"]["bytes"],
        }
        for source in sources
    ]


def learning_rate(step: int, steps: int, peak: float, warmup: int, final: float = 0.02) -> float:
    """Linear warm-up to ``peak``, then a cosine down to ``final * peak`` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


class TokenBatches:
    """Windows of the training stream in a fixed random order; the batch of a step depends on seed and step only."""

    def __init__(self, context: int, batch: int, seed: int) -> None:
        self.stream = np.load(WORK / "train.npy")
        self.context, self.batch, self.seed = context, batch, seed
        self.windows = (len(self.stream) - 1) // context
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(self.windows)} | (
                {epoch - 1: self._orders[epoch - 1]} if epoch - 1 in self._orders else {}
            )
        return self._orders[epoch]

    def __getitem__(self, step: int) -> np.ndarray:
        """The batch of a step: int64 [batch, context + 1]."""
        rows = []
        for number in range(step * self.batch, (step + 1) * self.batch):
            epoch, position = divmod(number, self.windows)
            start = int(self._order(epoch)[position]) * self.context
            rows.append(self.stream[start : start + self.context + 1])
        return np.stack(rows).astype(np.int64)


def stream_batches(stream: np.ndarray, context: int, batch: int) -> Iterator[np.ndarray]:
    """Consecutive windows [<= batch, context + 1] that predict every token of the stream but the first (and a short rest)."""
    windows = (len(stream) - 1) // context
    for first in range(0, windows, batch):
        rows = [stream[i * context : (i + 1) * context + 1] for i in range(first, min(first + batch, windows))]
        yield np.stack(rows).astype(np.int64)


def evaluate_lm(logits_of: Callable[[Any], Any], text: str, context: int = 256, batch: int = 8) -> dict[str, Any]:
    """Mean loss a token and bits a byte on a text, in windows of ``context`` tokens without overlap."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DATA / "text/tokenizer.json"))
    stream = np.array(tokenizer.encode(text).ids)
    total, count = 0.0, 0
    with torch.no_grad():
        for window in stream_batches(stream, context, batch):
            rows = len(window)
            # A short last batch is filled up, so that compiled code sees one shape only.
            tokens = torch.from_numpy(np.concatenate([window, np.repeat(window[-1:], batch - rows, axis=0)]))
            logits = logits_of(tokens[:, :-1])[:rows].float()
            tokens = tokens[:rows]
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
            count += tokens[:, 1:].numel()
    per_token = total / count
    tokens_per_byte = len(stream) / len(text.encode())
    return {
        "tokens": count,
        "context": context,
        "loss_per_token": round(per_token, 5),
        "perplexity": round(math.exp(per_token), 4),
        "bits_per_byte": round(per_token / math.log(2) * tokens_per_byte, 5),
    }


def evaluate_all(logits_of: Callable[[Any], Any], context: int = 256) -> dict[str, Any]:
    """``evaluate_lm`` on eval.txt and on each domain's file."""
    folder = DATA / "text"
    names = ["eval", *sorted(path.stem for path in folder.glob("eval_*.txt"))]
    return {name: evaluate_lm(logits_of, (folder / f"{name}.txt").read_text("utf-8"), context) for name in names}


def train(
    name: str,
    model: Any,
    loss_of: Callable[[int], Any],
    *,
    steps: int,
    peak: float,
    warmup: int,
    weight_decay: float,
    clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    checkpoint_every: int = 200,
) -> dict[str, Any]:
    """Train with AdamW; resume from the checkpoint if there is one. Return the loss curve and the seconds.

    ``loss_of(step)`` makes the step's batch, runs the model and returns the loss to be differentiated, or a pair of it and the
    loss to be recorded. Weight decay is on the parameters that are matrices or kernels (but not Mamba's A_log and RWKV's r_k).
    """
    import torch

    wide: list[Any] = []
    narrow: list[Any] = []
    for key, parameter in model.named_parameters():
        matrix = parameter.squeeze().ndim >= 2 and not key.endswith(("A_log", "r_k"))
        (wide if matrix else narrow).append(parameter)
    groups = [{"params": wide, "weight_decay": weight_decay}, {"params": narrow, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=betas, eps=1e-8, fused=True)
    checkpoint = WORK / name / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    first, curve, seconds = 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curve, seconds = state["step"], state["curve"], state["seconds"]
        print(f"{name}: resumed at step {first}", flush=True)
    model.train()
    began, recent = time.monotonic() - seconds, []
    for step in range(first, steps):
        rate = learning_rate(step, steps, peak, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        result = loss_of(step)
        loss, shown = result if isinstance(result, tuple) else (result, result)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(float(shown.detach()))
        done = step + 1
        if done % max(1, steps // 50) == 0 or done == steps or done == 10:
            seconds = time.monotonic() - began
            curve.append([done, round(sum(recent) / len(recent), 4)])
            recent = []
            print(f"{name}: step {done}/{steps} loss {curve[-1][1]} lr {rate:.2e} {seconds:.0f} s", flush=True)
        if done % checkpoint_every == 0 or done == steps:
            temporary = checkpoint.with_suffix(".tmp")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "curve": curve}
            torch.save(state | {"seconds": time.monotonic() - began}, temporary)
            temporary.replace(checkpoint)
    model.eval()
    return {"train_loss": curve, "seconds": round(time.monotonic() - began, 1), "optimizer": {
        "name": "AdamW", "betas": list(betas), "eps": 1e-8, "weight_decay": weight_decay, "decayed": "matrices and kernels",
        "gradient_clip": clip,
    }, "lr_schedule": {"kind": "linear warm-up, then cosine", "peak": peak, "warmup": warmup, "final_factor": 0.02}}  # fmt: skip


def install(staging: Path, name: str) -> Path:
    """Move the finished folder ``staging`` to its place in the package data; both are whole at any moment."""
    target = DATA / name
    old = staging.with_name(staging.name + ".old")
    if target.exists():
        target.rename(old)
    staging.rename(target)
    if old.exists():
        for path in old.iterdir():
            path.unlink()
        old.rmdir()
    return target


def staging_folder(name: str, with_tokenizer: bool = True) -> Path:
    """A fresh folder beside the final one, with the tokenizer's files for a language model."""
    folder = DATA / f".{name}.staging"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    if with_tokenizer:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((DATA / "text" / file).read_bytes())
    return folder


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of a folder's files."""
    return {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(folder.iterdir())}
