"""How well masks fit: the scores of referring segmentation.

Source: https://arxiv.org/abs/2112.02244, section 4.1; conventions as in its released test script: the mean is over sentences, and an IoU is 0 where
both masks are empty.
"""

from dataclasses import dataclass, field

import torch
from qcore.errors import QcoreError
from torch import Tensor

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def overlaps(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in both masks, and in either of them.  predicted, truth: [B, H, W] bool → [B], [B] int64"""
    if predicted.shape != truth.shape or predicted.ndim != 3:
        raise QcoreError(f"masks of one size are compared, [B, H, W], got {tuple(predicted.shape)} and {tuple(truth.shape)}")
    both = (predicted & truth).flatten(1).sum(1)
    either = (predicted | truth).flatten(1).sum(1)
    return both, either


@dataclass
class Masks:
    """Adds up sentence by sentence.

    intersections, unions: pixels, one number a sentence
    """

    intersections: list[int] = field(default_factory=list)
    unions: list[int] = field(default_factory=list)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """predicted, truth: [B, H, W] bool"""
        both, either = overlaps(predicted, truth)
        self.intersections += both.tolist()
        self.unions += either.tolist()

    @property
    def ious(self) -> Tensor:
        """IoU of each sentence; 0 where both masks are empty.  [n] float64"""
        both, either = (torch.tensor(v, dtype=torch.float64) for v in (self.intersections, self.unions))
        return torch.where(either > 0, both / either.clamp(min=1), 0.0)

    def scores(self) -> dict[str, float]:
        """ "miou": mean over sentences; "oiou": all intersections over all unions; "p50" … "p90": share of sentences with an IoU ≥ .5 … .9."""
        if not self.unions:
            raise QcoreError("no mask was compared; there are no scores")
        ious, union = self.ious, sum(self.unions)
        above = {f"p{round(100 * t)}": float((ious >= t).double().mean()) for t in THRESHOLDS}
        return {"miou": float(ious.mean()), "oiou": sum(self.intersections) / union if union else 0.0, **above}
