"""Numbers that lie close together near zero, as trained weights do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from qcore.numbers import NumberFormat
from torch import Tensor


@dataclass(frozen=True)
class Geometric(NumberFormat):
    """0 and ±1, ±base, ±base², …: 2**bits - 1 numbers, with the base fitted to the data.

    bits: of one code; 3 bits are 0, ±1, ±base and ±base²
    """

    name: ClassVar[str] = "geometric"
    bits: int

    lo: ClassVar[float] = -1.0
    hi: ClassVar[float] = 1.0
    parts: ClassVar[tuple[str, ...]] = ("base",)

    def fit(self, x: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """The base, of 25 between 0.3 and 0.9, with the least squared error.  x: [B, n] → base: [B]"""
        weight = torch.ones_like(x) if weight is None else weight
        bases = torch.linspace(0.3, 0.9, 25)
        errors = [(weight * (self._round(x, base) - x).square()).sum(-1) for base in bases]
        return {"base": bases[torch.stack(errors).argmin(0)]}

    def encode(self, x: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return self._index(x, self._base(params)).to(torch.uint8)

    def decode(self, codes: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return self._numbers(self._base(params))[codes.long()]

    def _base(self, params: Mapping[str, Tensor] | None) -> Tensor:
        assert params is not None and "base" in params, f"{self} needs its fitted base"
        return params["base"].float()

    def _numbers(self, base: Tensor) -> Tensor:
        """All numbers in order.  [2**bits - 1]"""
        powers = base ** torch.arange(2 ** (self.bits - 1) - 1)
        return torch.cat([-powers, torch.zeros(1), powers.flip(0)])

    def _index(self, x: Tensor, base: Tensor) -> Tensor:
        numbers = self._numbers(base)
        return torch.bucketize(x.float().contiguous(), (numbers[1:] + numbers[:-1]) / 2)

    def _round(self, x: Tensor, base: Tensor) -> Tensor:
        return self._numbers(base)[self._index(x, base)]
