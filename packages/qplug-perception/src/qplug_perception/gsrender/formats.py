"""Numbers of a Gaussian's attributes, and the range that is known of one beforehand.

| attribute | tapped | stored as |
|---|---|---|
| δμ | tanh, in [-1, 1] | symmetric integers over the known range: no calibration image can make it narrower |
| δs | the shift of a log-like scale | integers with a zero point: an equal relative step of every scale |
| opacity | behind the sigmoid | `TwoRegion`: its threshold τ is one of the numbers |
| semantics | logits | one scale for each class |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from qcore.calibration.observers import StreamingObserver
from qcore.errors import CalibrationError, SpecError
from qcore.numbers.formats import NO_PARAMS, NumberFormat, Params
from torch import Tensor


@dataclass(frozen=True)
class TwoRegion(NumberFormat):
    """0 … 1 in two uniform regions that meet exactly at `threshold`: `below` steps from 0 to it, the rest from it to 1.

    A number is coded in the region in which it lies (selected, never summed), so the threshold, 0 and 1 have no error.  With the nearest number, an
    opacity within half a step above τ becomes τ itself and is no longer above it; `keep_side` gives such a one the next code up: what is above τ
    stays above it, at an error of up to a whole step just there.

    bits=8, threshold=0.3, below=128: steps of 0.00234 below, 0.00551 above
    below: steps of the lower region; 0 = half of all codes
    """

    name: ClassVar[str] = "two-region"
    bits: int
    threshold: float = 0.5
    below: int = 0
    keep_side: bool = False

    lo = 0.0
    hi = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(f"two regions have 2 to 8 bits, got bits={self.bits}")
        if not 0 < self.threshold < 1:
            raise SpecError(f"a threshold lies between 0 and 1, got {self.threshold}")
        if not 0 <= self.below <= 2**self.bits - 2:
            raise SpecError(f"the lower region has 1 to {2**self.bits - 2} steps (0 = half of the codes), got below={self.below}")

    @property
    def steps_below(self) -> int:
        return self.below or 2 ** (self.bits - 1)

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return torch.bucketize(x.float().contiguous(), _bounds(self).to(x.device), out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return _numbers(self).to(codes.device)[codes.long()]


@lru_cache(maxsize=64)
def _numbers(fmt: TwoRegion) -> Tensor:
    """[2**bits] float32, ascending"""
    n, t = fmt.steps_below, fmt.threshold
    code = torch.arange(2**fmt.bits, dtype=torch.float64)
    low, high = t * code / n, t + (1 - t) * (code - n) / (2**fmt.bits - 1 - n)
    return torch.where(code <= n, low, high).float()


@lru_cache(maxsize=64)
def _bounds(fmt: TwoRegion) -> Tensor:
    """The largest float32 that still becomes each number but the last: the midpoints; with `keep_side` the threshold itself at its own code."""
    own = _numbers(fmt).double()
    middle = ((own[1:] + own[:-1]) / 2).float()
    if fmt.keep_side:
        middle[fmt.steps_below] = own[fmt.steps_below].float()
    return middle


@dataclass(kw_only=True)
class KnownRange(StreamingObserver):
    """A range that is known beforehand, such as [-1, 1] of a tanh; calibration only checks it.

    CalibrationError where a value lies outside: then it is not known.
    """

    name: ClassVar[str] = "known-range"
    parts: ClassVar[tuple[str, ...]] = ("low", "high")
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low <= 0 <= self.high or self.low == self.high:
            raise SpecError(f"a range holds zero and more, got {self.low} … {self.high}")

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        low, high = rows.aminmax()
        return {"low": low.float(), "high": high.float()}

    def _join(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"low": torch.minimum(a["low"], b["low"]), "high": torch.maximum(a["high"], b["high"])}

    def _finish(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        low, high = float(state["low"]), float(state["high"])
        if low < self.low or high > self.high:
            raise CalibrationError(f"values from {low:.6g} to {high:.6g} lie beyond the known range {self.low:g} … {self.high:g}; correct the range")
        return torch.tensor([self.low]), torch.tensor([self.high])
