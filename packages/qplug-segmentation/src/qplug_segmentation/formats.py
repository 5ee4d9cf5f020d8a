"""Number formats of activations whose parts come from calibration: a grid, two regions (DRQ), bands of magnitude (RORQ).

Their numbers are absolute: what calibration found (a step, a split, thresholds) are *fields*, so a spec without a scale (granularity "unscaled") says
all, a checkpoint stores it as plain data, and any tap or leaf that quantizes its input runs it.

Source: PTQ4RIS, https://arxiv.org/abs/2409.17020.  Every format rounds to the nearest of its numbers, but for bands read by the paper's rule.
The released code departs from that twice more:

- Its dual-region forward *adds* the two clamped quantizations; what lies in the upper region carries an extra split point, the search flees to tiny
  splits, and the error is about ten times that of one region at a time.
- Its selection "x ≥ τ ? round(x·Q)/Q : …" sends τ itself to 0 where τ·Q < 1/2, below numbers that it rounds to τ: not monotone from 8 splits on at
  8 bits.  The nearest number of either region is never worse, and the same elsewhere.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from qcore.errors import SpecError
from qcore.numbers.formats import NO_PARAMS, NumberFormat, Params
from torch import Tensor

GELU_LOW = 0.16997120747990369  # -min of x·Φ(x), at x = -0.7517915925
MOST_SHIFTS = 19


def _bits(what: str, bits: int) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise SpecError(f"{what} has 2 to 8 bits, got bits={bits!r}")


@dataclass(frozen=True)
class StepGrid(NumberFormat):
    """2^bits evenly spaced numbers: (first … first + 2^bits - 1) · step.

    step:  found by calibration
    first: the lowest code; -2^(bits-1) is symmetric, 0 has no negative numbers; an affine grid with zero point z has first = -z
    """

    name: ClassVar[str] = "step-grid"
    bits: int
    step: float
    first: int

    def __post_init__(self) -> None:
        _bits("a step grid", self.bits)
        if not self.step > 0 or not -(2**self.bits) < self.first <= 0:
            raise SpecError(f"a step grid has a positive step and 0 among its codes, got step={self.step}, first={self.first} at {self.bits} bits")

    @property
    def lo(self) -> float:
        return self.first * self.step

    @property
    def hi(self) -> float:
        return (self.first + 2**self.bits - 1) * self.step

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return ((x.float() / self.step).round() - self.first).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return (codes.float() + self.first) * self.step


@dataclass(frozen=True)
class DualRegion(NumberFormat):
    """Numbers in [0, 1] in two regions, for what comes out of a softmax.  One bit of the code is the region.

    With Q = 2^(bits-1) - 1 and τ = 2^-shift: the lower region has k·τ/Q, the upper one k/Q, k = 0 … Q.  Both steps differ by a shift, so products can
    be added up in integers.  0 and 1 are numbers of it.  shift = 0: one region, Q + 1 numbers.

    Source: PTQ4RIS, section III-B; the twin uniform quantization of PTQ4ViT, https://arxiv.org/abs/2111.12293, with τ free.
    """

    name: ClassVar[str] = "dual-region"
    bits: int
    shift: int

    lo = 0.0
    hi = 1.0

    def __post_init__(self) -> None:
        _bits("a dual region", self.bits)
        if type(self.shift) is not int or not 0 <= self.shift <= MOST_SHIFTS:
            raise SpecError(f"the split of a dual region is 2^-shift with shift = 0 … {MOST_SHIFTS}, got shift={self.shift!r}")

    @property
    def levels(self) -> int:
        """Q, the largest code of a region."""
        return 2 ** (self.bits - 1) - 1

    @property
    def split(self) -> float:
        """τ, the largest number of the lower region."""
        return 2.0**-self.shift

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        q = self.levels
        x = x.float()
        low = (x * (q / self.split)).round().clamp(0, q)
        high = (x * q).round().clamp(0, q)
        # ties go to the lower region, so that the same number always has the same code
        upper = (high / q - x).abs() < (low * (self.split / q) - x).abs()
        return torch.where(upper, high + 2 ** (self.bits - 1), low).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        own = codes.to(torch.int16)
        region = 2 ** (self.bits - 1)
        upper = own >= region
        return torch.where(upper, (own - region).float() / self.levels, own.float() * (self.split / self.levels))


@dataclass(frozen=True)
class GeluRegions(NumberFormat):
    """Two regions for what comes out of a GELU: below zero a fixed step that covers its minimum, above zero a step that calibration finds.

    Negative numbers: -k · 0.16997 / 2^(bits-1), k = 1 … 2^(bits-1);  others: k · step, k = 0 … 2^(bits-1) - 1.

    Over a whole tensor its squared error is larger than that of one affine grid (the positive region has half the codes), below zero some 400 times
    smaller: judge it by what comes out of the layer.  The ratio of the steps is no power of two, as in the released code.
    """

    name: ClassVar[str] = "gelu-regions"
    bits: int
    step: float

    def __post_init__(self) -> None:
        _bits("a pair of GELU regions", self.bits)
        if not self.step > 0:
            raise SpecError(f"the step above zero is positive, got {self.step}")

    @property
    def below(self) -> float:
        """The step below zero."""
        return GELU_LOW / 2 ** (self.bits - 1)

    @property
    def lo(self) -> float:
        return -GELU_LOW

    @property
    def hi(self) -> float:
        return self.step * (2 ** (self.bits - 1) - 1)

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        half = 2 ** (self.bits - 1)
        x = x.float()
        return torch.where(x < 0, (x / self.below).round().clamp(-half, 0), (x / self.step).round().clamp(0, half - 1)).to(torch.int8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        values = codes.float()
        return torch.where(values < 0, values * self.below, values * self.step)


@dataclass(frozen=True)
class MagnitudeBands(NumberFormat):
    """RORQ: bands of magnitude, each with an affine grid of its own, so that outliers are kept and cost the others nothing.

    Band j holds thresholds[j-1] < |x| ≤ thresholds[j].  Its grid: (k - zeros[j]) · steps[j], k = 0 … 2^width - 1.  A code is the band's number and k,
    so `bits` counts both: 6 bits in three bands are stored in 8.  At run time the band takes a ladder of comparisons for each element.

    width: bits of k
    rule:  "nearest": the nearest number of any band, which the band is stored for anyway; "band": that of the value's own band, as the paper has it,
           which is not monotone at a threshold (a value just above it may be rounded to one of a coarse grid that lies below); recipes take it

    What is larger than all that calibration saw belongs to the last band, the widest.  The release gives it to band 0, that of the smallest values.
    """

    name: ClassVar[str] = "magnitude-bands"
    width: int
    thresholds: tuple[float, ...]
    steps: tuple[float, ...]
    zeros: tuple[int, ...]
    rule: Literal["nearest", "band"] = "nearest"

    def __post_init__(self) -> None:
        _bits("a band", self.width)
        n = len(self.thresholds)
        if not n or len(self.steps) != n or len(self.zeros) != n or n > 16:
            raise SpecError(f"1 to 16 bands have a threshold, a step and a zero point each, got {n}, {len(self.steps)} and {len(self.zeros)}")
        if any(b <= a for a, b in zip(self.thresholds, self.thresholds[1:], strict=False)) or any(s <= 0 for s in self.steps):
            raise SpecError(f"thresholds rise and steps are positive, got {self.thresholds} and {self.steps}")
        if any(not 0 <= z < 2**self.width for z in self.zeros):
            raise SpecError(f"zero points are codes, 0 … {2**self.width - 1}, got {self.zeros}")
        if self.rule not in ("nearest", "band"):
            raise SpecError(f"unknown rule {self.rule!r} of magnitude bands; have: nearest, band")

    @property
    def bits(self) -> int:
        return self.width + (len(self.thresholds) - 1).bit_length()

    @property
    def lo(self) -> float:
        return min(-z * s for z, s in zip(self.zeros, self.steps, strict=True))

    @property
    def hi(self) -> float:
        return max((2**self.width - 1 - z) * s for z, s in zip(self.zeros, self.steps, strict=True))

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        x = x.float()
        codes = torch.stack([((x / s).round() + z).clamp(0, 2**self.width - 1) for s, z in zip(self.steps, self.zeros, strict=True)])  # [bands, …]
        if self.rule == "band":
            bounds = torch.tensor(self.thresholds[:-1], device=x.device)
            band = torch.bucketize(x.abs().contiguous(), bounds)
        else:
            steps, zeros = (torch.tensor(v, dtype=torch.float32, device=x.device).view(-1, *[1] * x.ndim) for v in (self.steps, self.zeros))
            band = ((codes - zeros) * steps - x).abs().argmin(0)
        own = codes.gather(0, band.unsqueeze(0)).squeeze(0).long()
        return (own + band * 2**self.width).to(torch.int16)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        own = codes.long()
        band, k = own >> self.width, own & (2**self.width - 1)
        steps, zeros = torch.tensor(self.steps, device=codes.device), torch.tensor(self.zeros, device=codes.device)
        return (k - zeros[band]).float() * steps[band]
