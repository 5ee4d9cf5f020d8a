"""A fixed range that values are clipped to."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qcore.errors import SpecError


class ClipRange(nn.Module):
    """x → min(max(x, low), high).

    Before a layer whose input has a static scale it settles what that scale covers: an observer of extremes finds no more than [low, high], and codes
    beyond it would be clipped to the same values anyway.

    low, high: [] buffers, low ≤ 0 ≤ high
    """

    name: ClassVar[str] = "clip-range"
    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor | None = None, high: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(-torch.inf) if low is None else low)
        self.register_buffer("high", torch.tensor(torch.inf) if high is None else high)
        if not self.low.is_meta and not (self.low <= 0 <= self.high):
            raise SpecError(f"a range holds zero, got {float(self.low):.4g} … {float(self.high):.4g}")

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, self.low.to(x.dtype)), self.high.to(x.dtype))

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls()
