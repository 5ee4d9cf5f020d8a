"""Codebooks for element-wise weights, weighted by what they are multiplied with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from qcore.calibration import StreamingObserver
from qcore.calibration.observer import Observer, Seen
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import QTensor, QuantSpec, quantize
from torch import Tensor

_STEPS = 4  # bins for each doubling
_LOWEST = -16  # log2 of the smallest magnitude that is told from zero
_BINS = 32 * _STEPS


@dataclass(kw_only=True)
class ClippedSquare(StreamingObserver):
    """The mean square of each channel with magnitudes clipped at a percentile of its own.  [K] float64

    Magnitudes are counted in bins a fourth of a doubling wide, with the exact sum of squares of each bin; what lies above the percentile's bin counts
    as that bin's upper end.

    percentile: 1 clips nothing
    Source: https://arxiv.org/abs/2505.03803, section 3.3.  The released code averages |mean x| instead, discards the first batch, and does not clip.
    """

    name: ClassVar[str] = "clipped-square"
    parts: ClassVar[tuple[str, ...]] = ("counts", "squares")
    percentile: float = 0.99

    def __post_init__(self) -> None:
        if not 0.5 < self.percentile <= 1:
            raise SpecError(f"a percentile lies above 0.5 and is at most 1, got {self.percentile}")

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        x = rows.double().T.contiguous()  # [K, T]
        bins = ((torch.log2(x.abs().clamp(min=2.0**_LOWEST)) - _LOWEST) * _STEPS).floor().long().clamp(0, _BINS - 1)
        w = torch.ones_like(x) if weight is None else weight.expand_as(x).contiguous()
        empty = x.new_zeros(len(x), _BINS)
        return {"counts": empty.scatter_add(1, bins, w), "squares": empty.scatter_add(1, bins, w * x.square())}

    def _join(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: a[name] + b[name] for name in self.parts}

    def _finish(self, state: dict[str, Tensor]) -> Tensor:
        counts, squares = state["counts"], state["squares"]
        total = counts.sum(1, keepdim=True)
        last = (counts.cumsum(1) < self.percentile * total * (1 - 1e-12)).sum(1, keepdim=True).clamp(max=_BINS - 1)  # the percentile's bin
        above = torch.arange(_BINS) > last
        edge = torch.exp2(_LOWEST + (last + 1).double() / _STEPS)
        return (torch.where(above, counts * edge.square(), squares).sum(1, keepdim=True) / total).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class WeightedCodebook:
    """Weighted k-means of an element-wise weight: the loss of y = x ∘ μ is Σ_j E[x_j²]·(μ_j - μ̂_j)², so E[x_j²] is the weight of μ_j.

    For codebooks of single numbers the code is the nearest number whatever the weight; the numbers themselves are weighted means.  No channel reaches
    another: there is nothing that could make up for an error, and no Gram matrix to look at.

    percentile: at which x is clipped, on both sides, before it is squared
    Source: https://arxiv.org/abs/2505.03803, section 3.3
    """

    name: ClassVar[str] = "weighted-codebook"
    percentile: float = 0.99

    @property
    def observes(self) -> tuple[Observer, ...]:
        return (ClippedSquare(percentile=self.percentile),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """See `WeightSolver.solve`.  weight: [1, C]"""
        if frozen is not None:
            raise SpecError("an element-wise weight keeps no entries frozen; leave out the transform that splits it")
        if not spec.format.parts:
            raise SpecError(f"a weighted codebook needs a fitted format, got {spec}; use format codebook, or solver rtn")
        if ClippedSquare.name not in seen:
            raise CalibrationError("the weighted codebook saw nothing of what its weight is multiplied with; calibrate this site, or use rtn")
        heavy = seen[ClippedSquare.name].to(weight)
        if heavy.shape != weight.shape[-1:]:
            raise CalibrationError(f"statistics of {tuple(heavy.shape)} channels do not fit an element-wise weight of {tuple(weight.shape)}")
        # channels that never fire still have a number near them
        heavy = heavy.clamp(min=1e-6 * heavy.mean().clamp(min=1e-30))
        return quantize(weight.detach(), spec, weight=(heavy / heavy.mean()).expand_as(weight))
