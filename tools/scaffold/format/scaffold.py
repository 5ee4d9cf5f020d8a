from dataclasses import dataclass
from typing import ClassVar

import torch
from qcore.numbers import NumberFormat
from torch import Tensor


@dataclass(frozen=True)
class Scaffold(NumberFormat):
    """The numbers -1, 0 and 1.

    Its fields, were there any, would be its options: recipes fill them in, checkpoints store them.
    """

    name: ClassVar[str] = "scaffold"
    bits: ClassVar[int] = 2
    lo: ClassVar[float] = -1.0
    hi: ClassVar[float] = 1.0

    def encode(self, x: Tensor, params=None) -> Tensor:
        return x.round().clamp(self.lo, self.hi).to(torch.int8)

    def decode(self, codes: Tensor, params=None) -> Tensor:
        return codes.float()
