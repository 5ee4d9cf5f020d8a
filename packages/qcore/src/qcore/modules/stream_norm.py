"""LayerNorm on a residual stream that was rotated."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class StreamNorm(nn.Module):
    """y = (x - (x·u)u) / √(mean of squares + ε), then y·A + b where there are such: LayerNorm in rotated channels.

    LayerNorm takes the mean away: it projects x on what is orthogonal to u = (1, …, 1)/√d.  After a rotation R of the channels u is uR.  Where the
    stream is centred, because all that writes it is, there is nothing to take away: no u, and this is RMSNorm.  A norm that stands in the stream
    itself (what it puts out is what blocks add to) has gains and a bias that no layer behind it can take over; A = Rᵀ diag(g) R and bR do their
    work.  A bias alone stays where a layer behind the norm has none that could take it over.

    size:      d
    eps:       the LayerNorm's own; it is added to the same number, the variance
    direction: [d] u, or None
    matrix:    [d, d] A, or None
    shift:     [d] b, or None
    """

    name: ClassVar[str] = "stream-norm"
    direction: Tensor | None
    matrix: Tensor | None
    shift: Tensor | None

    def __init__(self, size: int, eps: float, direction: Tensor | None = None, matrix: Tensor | None = None, shift: Tensor | None = None) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.register_buffer("direction", direction)
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if self.direction is not None:
            u = self.direction.to(wide.dtype)
            wide = wide - (wide @ u).unsqueeze(-1) * u
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.matrix is not None:
            y = y @ self.matrix.to(y.dtype)
        if self.shift is not None:
            y = y + self.shift.to(y.dtype)
        return y.to(x.dtype)

    def config(self) -> dict[str, Any]:
        matrix, shift = self.matrix is not None, self.shift is not None
        return {"size": self.size, "eps": self.eps, "centred": self.direction is None, "matrix": matrix, "shift": shift}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        d = config["size"]
        return cls(
            d,
            config["eps"],
            None if config["centred"] else torch.zeros(d, dtype=torch.float64),
            torch.zeros(d, d, dtype=torch.float64) if config["matrix"] else None,
            torch.zeros(d, dtype=torch.float64) if config["shift"] else None,
        )

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, centred={self.direction is None}, matrix={self.matrix is not None}, shift={self.shift is not None}"
