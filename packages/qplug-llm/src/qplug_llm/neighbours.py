"""Labels by nearest neighbours: what a quantized sentence embedder is still good for, and how far it is from its float self.

A text's embedding is the mean of its hidden states, normed to length 1, as sentence-transformers' MiniLM is used.  Beside the accuracy of the labels
stands a divergence: that of the distribution softmax(20·cos) over the training texts, the very one (scale 20) that such models are trained by.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from qcore.calibration.text import data_hash
from qcore.errors import QcoreError
from qcore.evaluation import Reference
from qcore.evaluation.metrics import Distance
from qcore.evaluation.store import write_reference
from qcore.evaluation.task import Forward, Progress, Scores, run_each
from torch import Tensor

SCALE = 20.0  # of cosines: sentence-transformers' MultipleNegativesRankingLoss


@dataclass(frozen=True)
class NearestNeighbours:
    """k nearest neighbours among training texts, by cosine, decide a test text's label; where votes are even, the nearest of all does.

    ids:    token ids of each text, its special tokens included
    labels: [n] class of each text
    train:  so many of the texts, the first, are what neighbours are looked for in; the others are labelled
    pad:    id of what fills up a batch
    """

    name: ClassVar[str] = "nearest-neighbours"
    better: ClassVar[dict[str, bool]] = {"accuracy": True, "kl": False, "top1": True, "cosine": True}
    ids: Sequence[Tensor]
    labels: Tensor
    train: int
    k: int = 5
    pad: int = 0
    batch: int = 32

    def __post_init__(self) -> None:
        if not self.k <= self.train < len(self.ids):
            raise QcoreError(f"{self.k} neighbours of {len(self.ids)} texts, {self.train} of them to be looked for: want k ≤ train < number of texts")
        if self.labels.shape != (len(self.ids),):
            raise QcoreError(f"{len(self.ids)} texts, but labels of shape {tuple(self.labels.shape)}")

    def data(self) -> str:
        return data_hash(*self.ids, self.labels)

    def sample(self) -> dict[str, Tensor]:
        """One small batch."""
        return self._padded(self.ids[:2])

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        return write_reference(folder, self._embeddings(forward, "float model", progress), len(self.ids), self.data())

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        if reference.data != self.data():
            raise QcoreError(f"the reference in {reference.folder} is of other texts; make it anew")
        theirs = reference.read(0, len(self.ids))
        mine = torch.cat(list(self._embeddings(forward, "evaluate", progress))).to(theirs)
        distance = Distance()
        near, near_reference = (SCALE * e[self.train :].double() @ e[: self.train].double().T for e in (mine, theirs))
        for ours, floats in zip(near.split(64), near_reference.split(64), strict=True):
            distance.add(floats, ours)
        labels = self.labels[self.train :]
        found, found_reference = self._labelled(near), self._labelled(near_reference)
        return {
            "accuracy": float((found == labels).double().mean()),
            "accuracy_reference": float((found_reference == labels).double().mean()),
            "top1": float((found == found_reference).double().mean()),
            "kl": distance.kl.mean,
            "kl_standard_error": distance.kl.standard_error,
            "cosine": float((mine.double() * theirs.double()).sum(-1).mean()),
            "texts": len(labels),
        }

    def _labelled(self, near: Tensor) -> Tensor:
        """[test, train] nearness → [test] labels"""
        own = self.labels[: self.train][near.topk(self.k, dim=1).indices]  # [test, k], the nearest first
        votes = F.one_hot(own, int(self.labels.max()) + 1).double()
        return (votes.sum(1) + 0.5 * votes[:, 0]).argmax(1)

    @torch.no_grad()
    def _embeddings(self, forward: Forward, phase: str, progress: Progress | None) -> Iterator[Tensor]:
        starts = range(0, len(self.ids), self.batch)
        batches = [self._padded(self.ids[i : i + self.batch]) for i in starts]
        for i, (hidden, batch) in enumerate(zip(run_each(forward, batches), batches, strict=True), 1):
            if not torch.isfinite(hidden).all():
                raise QcoreError(f"hidden states of batch {i} are NaN or infinite")
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden)
            yield F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).float()
            if progress is not None:
                progress(phase, i, len(batches))

    def _padded(self, texts: Sequence[Tensor]) -> dict[str, Tensor]:
        longest = max(len(t) for t in texts)
        ids = torch.stack([F.pad(t, (0, longest - len(t)), value=self.pad) for t in texts])
        mask = torch.stack([F.pad(torch.ones_like(t), (0, longest - len(t))) for t in texts])
        return {"input_ids": ids, "attention_mask": mask}


def encoded(tokenizer: Any, texts: Sequence[str], longest: int = 128) -> list[Tensor]:
    """Token ids of texts, with the special tokens that a sentence embedder wants.  tokenizer: transformers' own"""
    return [torch.tensor(tokenizer.encode(text, truncation=True, max_length=longest)) for text in texts]
