"""NormalFloat: numbers that a normal distribution visits equally often, the format of QLoRA's frozen weights."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers.formats import NO_PARAMS, NumberFormat, Params


@dataclass(frozen=True)
class NormalFloat(NumberFormat):
    """2^bits fixed numbers between -1 and 1: quantiles of a normal distribution, zero among them, one more of them above zero than below.

    bits: 2 to 8; 4 is NF4

    The table is computed, not pasted: 2^(bits-1) quantiles above zero and 2^(bits-1) - 1 below, at evenly spaced probabilities from one half to
    1 - (1/(2^bits - 1) + 1/2^bits) / 4, which is 0.9677083 for NF4, divided by the largest.  Codes are indices, ascending.
    Source: QLoRA, https://arxiv.org/abs/2305.14314, section 3; the offset is that of bitsandbytes' `create_normal_map`.
    """

    name: ClassVar[str] = "normal-float"
    bits: int = 4

    lo = -1.0
    hi = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(f"a normal float has 2 to 8 bits, got bits={self.bits}")

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return torch.bucketize(x.float().contiguous(), _bounds(self.bits).to(x.device), out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return _table(self.bits).to(codes.device)[codes.int()]


@lru_cache(maxsize=8)
def _table(bits: int) -> Tensor:
    """[2^bits] float32, ascending; -1, 0 and 1 are exact."""
    half, levels = 1 << (bits - 1), 1 << bits
    top = 1 - (1 / (levels - 1) + 1 / levels) / 4
    above = torch.special.ndtri(torch.linspace(0.5, top, half + 1, dtype=torch.float64)[1:])
    below = -torch.special.ndtri(torch.linspace(0.5, top, half, dtype=torch.float64)[1:]).flip(0)
    return torch.cat([below / -below[0], torch.zeros(1, dtype=torch.float64), above / above[-1]]).float()


@lru_cache(maxsize=8)
def _bounds(bits: int) -> Tensor:
    """[2^bits - 1] the largest number that still belongs to each entry but the last: midpoints; a tie goes to the lower one."""
    table = _table(bits).double()
    return ((table[1:] + table[:-1]) / 2).float()
