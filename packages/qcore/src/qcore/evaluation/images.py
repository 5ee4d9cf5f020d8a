"""Image classification: what a quantized classifier gets right, and how far it is from its float self."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from qcore.calibration.images import Preprocessing, prepared
from qcore.calibration.text import data_hash
from qcore.errors import QcoreError
from qcore.evaluation.metrics import Distance
from qcore.evaluation.store import LARGEST_FLOAT32, Reference, write_reference
from qcore.evaluation.task import Batch, Forward, Progress, Scores, check_outputs, counted, run_each, same_data


@dataclass(frozen=True)
class ImageClassification:
    """Top-1 accuracy on true labels, and agreement, KL divergence and signal-to-noise ratio against the float model.

    Two models are compared on the same images, so beside both accuracies stands how they differ: `lost` is the share of images that only the float
    model gets right, `gained` of those that only the quantized one does.  accuracy = accuracy_reference - lost + gained, and the standard error of
    that difference follows from the two shares: it is much smaller than that of either accuracy.

    pixels: uint8 [n, C, H, W]
    preprocessing: what the model wants
    labels: [n] classes, or None: no accuracy then
    batch:  images of one forward pass
    """

    name: ClassVar[str] = "image-classification"
    better: ClassVar[dict[str, bool]] = {"accuracy": True, "top1": True, "kl": False, "sqnr_db": True, "lost": False, "gained": True}
    pixels: Tensor
    preprocessing: Preprocessing
    labels: Tensor | None = None
    batch: int = 100
    largest: int = LARGEST_FLOAT32

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or not len(self.pixels):
            raise QcoreError(f"image classification wants images [n, C, H, W] with n > 0, got {tuple(self.pixels.shape)}")
        if self.labels is not None and self.labels.shape != self.pixels.shape[:1]:
            raise QcoreError(f"{len(self.pixels)} images, but labels of shape {tuple(self.labels.shape)}")
        self.preprocessing(self.pixels[:1])  # before the long computation

    def data(self) -> str:
        return data_hash(self.pixels)

    def sample(self) -> Batch:
        return self.preprocessing(self.pixels[:8])

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        return write_reference(
            folder, counted(self._outputs(forward), "float model", self._batches, progress), len(self.pixels), self.data(), self.largest
        )

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        same_data(self, reference)
        if self.labels is not None and int(self.labels.max()) >= reference.classes:
            raise QcoreError(
                f"a label is {int(self.labels.max())}, but the model has {reference.classes} classes; are these the labels of its data set?"
            )
        distance, at, lost, gained = Distance(), 0, 0, 0
        for i, logits in enumerate(counted(self._outputs(forward), "evaluate", self._batches, progress)):
            check_outputs(logits, reference, f"batch {i}")
            float_logits = reference.read(at, at + len(logits))
            targets = None if self.labels is None else self.labels[at : at + len(logits)]
            distance.add(float_logits, logits, targets)
            if targets is not None:
                before, after = float_logits.argmax(-1) == targets, logits.argmax(-1) == targets
                lost, gained = lost + int((before & ~after).sum()), gained + int((after & ~before).sum())
            at += len(logits)
        scores = {
            "kl": distance.kl.mean,
            "kl_standard_error": distance.kl.standard_error,
            "top1": distance.top1.mean,
            "sqnr_db": distance.sqnr_db,
            "images": at,
        }
        if self.labels is not None:
            share, away = (gained - lost) / at, (gained + lost) / at
            scores |= {
                "accuracy": distance.hits.mean,
                "accuracy_reference": distance.hits_reference.mean,
                "lost": lost / at,
                "gained": gained / at,
                "accuracy_change_standard_error": (max(away - share**2, 0.0) / at) ** 0.5,
            }
        return scores

    @property
    def _batches(self) -> int:
        return -(-len(self.pixels) // self.batch)

    @torch.no_grad()
    def _outputs(self, forward: Forward) -> Iterator[Tensor]:
        for logits in run_each(forward, prepared(self.pixels, self.preprocessing, self.batch)):
            if logits.ndim != 2:
                raise QcoreError(f"a classifier gives logits [n, classes], this model gives {tuple(logits.shape)}")
            yield logits.cpu()
