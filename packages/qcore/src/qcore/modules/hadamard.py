"""A Hadamard rotation at run time."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.errors import SpecError
from qcore.model.tap import Tap
from qcore.numbers.hadamard import core_size, padded_size, transform


class OnlineHadamard(nn.Module):
    """x → (pad(x) ∘ signs)·Hᵀ along the last axis, in O(n log n).  [..., size] → [..., padded]

    `transforms.rewrite.Hadamard` does the same to the weight that reads it, so that the product stays: (xR)(wR)ᵀ = xwᵀ.

    padded: size after zeros were appended; the size itself where it has a Hadamard matrix
    signs:  [padded] of ±1, a buffer; all ones without
    """

    name: ClassVar[str] = "hadamard"
    signs: Tensor

    def __init__(self, size: int, padded: int | None = None, signs: Tensor | None = None) -> None:
        super().__init__()
        self.size, self.padded = size, padded_size(size) if padded is None else padded
        if self.padded < size or core_size(self.padded) is None:
            raise SpecError(f"no Hadamard matrix of size {self.padded} holds {size} channels; pad to {padded_size(max(size, self.padded))}")
        self.register_buffer("signs", torch.ones(self.padded) if signs is None else signs)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            raise SpecError(f"an online rotation of {self.size} channels got {x.shape[-1]}")
        return transform(F.pad(x, (0, self.padded - self.size)) * self.signs.to(x.dtype))

    def config(self) -> dict[str, Any]:
        return {"size": self.size, "padded": self.padded}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["size"], config["padded"])


class HeadHadamard(Tap):
    """Rotate every head of a tapped tensor [..., H·D] by the same Hadamard matrix, in blocks where D has none.

    At both q and k, after the rotary embedding, the scores stay: (qR)(kR)ᵀ = qkᵀ, and what a key cache stores has no outlying channels.

    size:  D, channels of one head
    block: of the matrix, a divisor of D
    """

    name: ClassVar[str] = "head-hadamard"

    def __init__(self, size: int, block: int | None = None) -> None:
        super().__init__()
        self.size, self.block = size, size if block is None else block
        if core_size(self.block) is None or size % self.block:
            raise SpecError(f"no Hadamard matrix of size {self.block} fills heads of {size} channels; choose a divisor that has one")

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        if x.shape[-1] % self.size:
            raise SpecError(f"heads of {self.size} channels do not divide the {x.shape[-1]} that came")
        return transform(x.unflatten(-1, (-1, self.block))).flatten(-2)

    def config(self) -> dict[str, Any]:
        return {"size": self.size, "block": self.block}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["size"], config["block"])
