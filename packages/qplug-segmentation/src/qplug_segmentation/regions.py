"""What calibration finds for the formats of activations, without a model: thresholds of bands, affine grids, the split of least squared error."""

from dataclasses import dataclass
from typing import Literal

import torch
from qcore.errors import CalibrationError
from torch import Tensor

from qplug_segmentation.formats import MOST_SHIFTS, DualRegion, MagnitudeBands, StepGrid

MOST_BANDS = 10


def affine_grid(low: float, high: float, bits: int) -> StepGrid:
    """2^bits numbers over [low, high], zero among them.  (-3.5, 10.2) at 4 bits: step .913, zero point 4"""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1) or 1.0
    return StepGrid(bits, step, -min(max(round(-low / step), 0), 2**bits - 1))


def symmetric_grid(largest: float, bits: int) -> StepGrid:
    """2^bits numbers around zero whose lowest code is -2^(bits-1), with the step of PTQ4ViT: largest / (2^(bits-1) - 1/2)."""
    return StepGrid(bits, largest / (2 ** (bits - 1) - 0.5) or 1.0, -(2 ** (bits - 1)))


@dataclass(frozen=True)
class OutlierBands:
    """How the thresholds of `MagnitudeBands` are found: T = mean + `deviations` standard deviations of |x|, again and again on what lies above.

    threshold: "mean": mean and deviation of the non-zero magnitudes (the paper); "median": median and median deviation (times 1.4826)
    bands:     at most so many
    share:     a band that would hold a smaller share of all values than this is one with the band below it; 0 = as the release

    Source: PTQ4RIS, section III-C and `reorder` of its code, which allows ten bands.  Its early exit where there are no outliers tests the size of
    the tensor and never happens; here a tensor below the first threshold has one band.  Its bands are fitted on tensors in which all other values
    were set to zero, so every range is two-sided; here a band's grid covers the values in it, and zero.
    """

    threshold: Literal["mean", "median"] = "mean"
    deviations: float = 3.0
    bands: int = MOST_BANDS
    share: float = 0.0

    def thresholds(self, x: Tensor) -> list[float]:
        """Rising thresholds of the magnitudes; the last is the largest magnitude."""
        rest = x.detach().abs().flatten().double()
        if not rest.numel() or not bool(torch.isfinite(rest).all()):
            raise CalibrationError(f"bands are found on finite values, got {rest.numel()} of which {int((~torch.isfinite(rest)).sum())} are not")
        count, largest, found = rest.numel(), float(rest.max()), list[float]()
        while len(found) < self.bands - 1 and rest.numel():
            heavy = rest[rest > 0]
            if not heavy.numel():
                break
            if self.threshold == "mean":
                t = float(heavy.mean() + self.deviations * heavy.std(unbiased=False))
            else:
                middle = heavy.median()
                t = float(middle + self.deviations * 1.4826 * (heavy - middle).abs().median())
            above = rest[rest > t]
            # equal values, or none left: they are the last band
            if t >= largest or above.numel() in (0, rest.numel()) or above.numel() < self.share * count:
                break
            found.append(t)
            rest = above
        return [*found, largest]

    def fit(self, x: Tensor, bits: int, rule: Literal["nearest", "band"] = "nearest") -> MagnitudeBands:
        """The format for values like `x`; one band is the affine grid of all of them."""
        thresholds = self.thresholds(x)
        thresholds = [float(torch.tensor(t, dtype=torch.float32)) for t in thresholds]
        if thresholds[-1] == 0:
            return MagnitudeBands(bits, (1.0,), (1.0,), (0,), rule)
        flat = x.detach().flatten().float()
        band = torch.bucketize(flat.abs(), torch.tensor(thresholds[:-1]))
        members = [flat[band == j] for j in range(len(thresholds))]
        grids = [affine_grid(float(own.min()), float(own.max()), bits) for own in members]
        return MagnitudeBands(bits, tuple(thresholds), tuple(g.step for g in grids), tuple(-g.first for g in grids), rule)


def best_split(p: Tensor, bits: int) -> DualRegion:
    """The dual region of least squared error on these probabilities, among the splits 2^0 … 2^-19."""
    return min((DualRegion(bits, i) for i in range(MOST_SHIFTS + 1)), key=lambda f: float((f.decode(f.encode(p)) - p).square().mean()))
