"""What an evaluation is: data, and what is compared on it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qcore.calibration.text import data_hash
from qcore.errors import QcoreError
from qcore.evaluation.metrics import Distance, perplexity
from qcore.evaluation.store import LARGEST_FLOAT32, Reference, write_reference

Batch = Any
Forward = Callable[[Batch], Tensor]
Progress = Callable[[str, int, int], None]
Scores = dict[str, float]


class Task(Protocol):
    """Data on which a float model and a quantized one are compared.

    name:   lower case
    better: for each score a larger value of which is better: True; a smaller one: False; scores not named here are counts
    """

    name: ClassVar[str]
    better: ClassVar[dict[str, bool]]

    def data(self) -> str:
        """sha256 of the data."""

    def sample(self) -> Batch:
        """One small batch: a checkpoint is proved on it."""

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        """Run the float model once, and keep its outputs in `folder`."""

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        """Compare a model with what `reference` kept of the float one."""


@dataclass(frozen=True)
class LanguageModeling:
    """Next-token prediction over windows of token ids that do not overlap.

    Token t of a window is predicted from the tokens before it in the same window, so T - 1 of its T positions count, for every score alike.

    windows: [n, T] token ids
    batch:   windows of one forward pass
    largest: bytes up to which the reference is kept as float32
    """

    name: ClassVar[str] = "language-modeling"
    better: ClassVar[dict[str, bool]] = {"perplexity": False, "kl": False, "top1": True}
    windows: Tensor
    batch: int = 1
    largest: int = LARGEST_FLOAT32

    def __post_init__(self) -> None:
        if self.windows.ndim != 2 or self.windows.shape[1] < 2 or not len(self.windows):
            raise QcoreError(f"language modeling wants windows [n, T] with T >= 2, got {tuple(self.windows.shape)}")

    def data(self) -> str:
        return data_hash(self.windows)

    def sample(self) -> Batch:
        return {"input_ids": self.windows[:1]}

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        rows = len(self.windows) * (self.windows.shape[1] - 1)
        return write_reference(folder, counted(self._outputs(forward), "float model", len(self.windows), progress), rows, self.data(), self.largest)

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        same_data(self, reference)
        distance, rows = Distance(), self.windows.shape[1] - 1
        if int(self.windows.max()) >= reference.classes:
            raise QcoreError(
                f"the text holds token {int(self.windows.max())}, but the model gives {reference.classes} values for each: these are no logits over "
                "a vocabulary, and it cannot be judged as a language model; leave out --eval, and evaluate it by a task of its own"
            )
        for i, logits in enumerate(counted(self._outputs(forward), "evaluate", len(self.windows), progress)):
            check_outputs(logits, reference, f"window {i}")
            distance.add(reference.read(i * rows, (i + 1) * rows), logits, self.windows[i, 1:])
        return {
            "perplexity": perplexity(distance.nll.mean),
            "perplexity_reference": perplexity(distance.nll_reference.mean),
            "kl": distance.kl.mean,
            "kl_standard_error": distance.kl.standard_error,
            "top1": distance.top1.mean,
            "tokens": distance.kl.rows,
            "windows": len(self.windows),
            "window": self.windows.shape[1],
        }

    def part(self, tokens: int, reference: Reference) -> "tuple[LanguageModeling, Reference]":
        """The first windows alone, about `tokens` tokens of them (at least one window), with what the reference kept of them."""
        count = max(1, min(len(self.windows), tokens // self.windows.shape[1]))
        first = replace(self, windows=self.windows[:count])
        return first, reference.first(count * (self.windows.shape[1] - 1), first.data())

    @torch.no_grad()
    def _outputs(self, forward: Forward) -> Iterable[Tensor]:
        """Logits of each window's counted positions.  [T - 1, V]"""
        for logits in run_each(forward, ({"input_ids": ids} for ids in self.windows.split(self.batch))):
            yield from logits[:, :-1]


@dataclass(frozen=True)
class Agreement:
    """A classifier against its float self: divergence, top-1 agreement, signal-to-noise ratio, and accuracy where labels are known.

    batches: what the model takes; outputs are logits [B, …, V]
    labels:  [B, …] of each batch, or None
    """

    name: ClassVar[str] = "agreement"
    better: ClassVar[dict[str, bool]] = {"kl": False, "top1": True, "sqnr_db": True, "accuracy": True}
    batches: Sequence[Batch]
    labels: Sequence[Tensor] | None = None
    largest: int = LARGEST_FLOAT32

    def __post_init__(self) -> None:
        if not len(self.batches):
            raise QcoreError("an agreement task wants at least one batch")
        if self.labels is not None and len(self.labels) != len(self.batches):
            raise QcoreError(f"{len(self.batches)} batches, but labels for {len(self.labels)}")

    def data(self) -> str:
        return data_hash(*(t for batch in self.batches for t in tensors_of(batch)))

    def sample(self) -> Batch:
        return self.batches[0]

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        outputs = [o.cpu() for o in counted(self._outputs(forward), "float model", len(self.batches), progress)]
        return write_reference(folder, outputs, sum(map(len, outputs)), self.data(), self.largest)

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        same_data(self, reference)
        distance, at = Distance(), 0
        for i, logits in enumerate(counted(self._outputs(forward), "evaluate", len(self.batches), progress)):
            check_outputs(logits, reference, f"batch {i}")
            targets = None if self.labels is None else self.labels[i].reshape(-1)
            distance.add(reference.read(at, at + len(logits)), logits, targets)
            at += len(logits)
        scores = {
            "kl": distance.kl.mean,
            "kl_standard_error": distance.kl.standard_error,
            "top1": distance.top1.mean,
            "sqnr_db": distance.sqnr_db,
            "rows": distance.kl.rows,
        }
        if self.labels is not None:
            scores |= {"accuracy": distance.hits.mean, "accuracy_reference": distance.hits_reference.mean}
        return scores

    @torch.no_grad()
    def _outputs(self, forward: Forward) -> Iterable[Tensor]:
        for logits in run_each(forward, self.batches):
            yield logits.reshape(-1, logits.shape[-1])


def run_each(forward: Forward, batches: Iterable[Batch]) -> Iterable[Tensor]:
    """The outputs of every batch; a forward that takes all batches through one block after the other (`StreamedModel`) is asked for that."""
    each = getattr(forward, "each", None)
    return each(batches) if callable(each) else map(forward, batches)


def counted(outputs: Iterable[Tensor], phase: str, total: int, progress: Progress | None) -> Iterable[Tensor]:
    """The outputs as they come, each reported."""
    for i, output in enumerate(outputs, 1):
        yield output
        if progress is not None:
            progress(phase, i, total)


def same_data(task: Task, reference: Reference) -> None:
    """QcoreError where the reference was made on other data."""
    if (own := task.data()) != reference.data:
        raise QcoreError(f"the reference in {reference.folder} is of other data ({reference.data[:12]}…, this task has {own[:12]}…); make it anew")


def check_outputs(logits: Tensor, reference: Reference, where: str) -> None:
    """QcoreError where outputs are no numbers, or of another number of classes than the float model\'s."""
    if logits.shape[-1] != reference.classes:
        raise QcoreError(f"the model gives {logits.shape[-1]} classes, its float reference {reference.classes}; they are not the same model")
    if not torch.isfinite(logits).all():
        raise QcoreError(
            f"the quantized model's output is NaN or infinite in {where}; try the recipe with float16-safe scales "
            "(--set rules.0.scale=bfloat16), or leave layers float: a rule with `float = true`"
        )


def tensors_of(batch: Batch) -> Iterable[Tensor]:
    """All tensors of a batch, those of a dict in the order of its keys."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for key in sorted(batch):
            yield from tensors_of(batch[key])
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from tensors_of(item)
