"""Referring segmentation as a task: masks against the truth, and against those of the float model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from qcore.errors import QcoreError
from qcore.evaluation.metrics import Distance
from qcore.evaluation.store import LARGEST_FLOAT32, Reference, write_reference
from qcore.evaluation.task import Batch, Forward, Progress, Scores, check_outputs, counted, run_each, same_data
from torch import Tensor

from qplug_segmentation.metrics import Masks
from qplug_segmentation.triples import SentenceEncoder, Triples, model_batches


@dataclass(frozen=True)
class ReferringSegmentation:
    """mIoU, oIoU and P@.5 … .9 on the true masks; IoU with the float model's masks, KL divergence and agreement of pixels.

    triples: what is judged
    encode:  of the model
    batch:   sentences of one forward pass
    """

    name: ClassVar[str] = "referring-segmentation"
    better: ClassVar[dict[str, bool]] = {
        **dict.fromkeys(("miou", "oiou", "p50", "p60", "p70", "p80", "p90", "miou_to_float", "top1", "sqnr_db"), True),
        "kl": False,
    }
    triples: Triples
    encode: SentenceEncoder
    batch: int = 16
    largest: int = LARGEST_FLOAT32

    def __post_init__(self) -> None:
        if not len(self.triples):
            raise QcoreError("referring segmentation wants at least one (image, sentence, mask)")

    def data(self) -> str:
        return self.triples.digest()

    def sample(self) -> Batch:
        return next(model_batches(self.triples, self.encode, 4))

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        outputs = counted(self._outputs(forward), "float model", self._batches, progress)
        rows = (logits.reshape(-1, logits.shape[-1]) for logits in outputs)
        return write_reference(folder, rows, self.triples.masks.numel(), self.data(), self.largest)

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        same_data(self, reference)
        distance, own, float_model, between = Distance(), Masks(), Masks(), Masks()
        at = row = 0
        for i, logits in enumerate(counted(self._outputs(forward), "evaluate", self._batches, progress)):
            check_outputs(logits, reference, f"batch {i}")
            flat = logits.reshape(-1, logits.shape[-1])
            before = reference.read(row, row + len(flat))
            distance.add(before, flat)
            mask, float_mask = logits.argmax(-1) == 1, before.reshape(logits.shape).argmax(-1) == 1
            truth = self.triples.masks[at : at + len(logits)]
            own.add(mask, truth)
            float_model.add(float_mask, truth)
            between.add(mask, float_mask)
            at, row = at + len(logits), row + len(flat)
        return {
            **own.scores(),
            "miou_reference": float_model.scores()["miou"],
            "oiou_reference": float_model.scores()["oiou"],
            "miou_to_float": between.scores()["miou"],
            "kl": distance.kl.mean,
            "kl_standard_error": distance.kl.standard_error,
            "top1": distance.top1.mean,
            "sqnr_db": distance.sqnr_db,
            "sentences": at,
        }

    @property
    def _batches(self) -> int:
        return -(-len(self.triples) // self.batch)

    @torch.no_grad()
    def _outputs(self, forward: Forward) -> Iterator[Tensor]:
        for logits in run_each(forward, model_batches(self.triples, self.encode, self.batch)):
            if logits.ndim != 4 or logits.shape[-1] != 2:
                raise QcoreError(f"a referring segmentation model gives logits [B, H, W, 2], this one gives {tuple(logits.shape)}")
            yield logits.cpu()
