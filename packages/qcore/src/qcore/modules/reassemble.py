"""Channels taken apart and put together at run time, before a layer whose weight was changed to match."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qcore.errors import SpecError


class ReassembleChannels(nn.Module):
    """y_k = (x[a_k] + x[b_k]) / (2·t_k) along the last axis.  [..., size] → [..., width]

    One of t copies of channel j has a = b = j and t_k = t; the mean of channels i and j has a = i, b = j and t_k = 1; a channel that stays has a = b
    and t_k = 1.  Counts are integers and divided by, so that t copies add up to their channel in every float type.

    size, width: channels that come in, and that go out
    pairs:       [2, width] int64, a and b, a buffer
    copies:      [width] int64, t, a buffer
    """

    name: ClassVar[str] = "reassemble-channels"
    pairs: Tensor
    copies: Tensor

    def __init__(self, size: int, width: int, pairs: Tensor | None = None, copies: Tensor | None = None) -> None:
        super().__init__()
        if width < 1 or size < 1:
            raise SpecError(f"channels are reassembled from at least one into at least one, got {size} into {width}")
        self.size, self.width = size, width
        self.register_buffer("pairs", torch.zeros(2, width, dtype=torch.long) if pairs is None else pairs)
        self.register_buffer("copies", torch.ones(width, dtype=torch.long) if copies is None else copies)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            raise SpecError(f"a reassembly of {self.size} channels got {x.shape[-1]}")
        return (x[..., self.pairs[0]] + x[..., self.pairs[1]]) / (2 * self.copies).to(x.dtype)

    def config(self) -> dict[str, Any]:
        return {"size": self.size, "width": self.width}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["size"], config["width"])
