"""The covariance of a site's inputs, over all calibration batches."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from qcore.calibration import StreamingObserver
from torch import Tensor


@dataclass(kw_only=True)
class Covariance(StreamingObserver):
    """Σ w (x - m)(x - m)ᵀ / Σ w with m the weighted mean.  [K, K] float64"""

    name: ClassVar[str] = "covariance"
    parts: ClassVar[tuple[str, ...]] = ("n", "sum", "outer")

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        x = rows.double()
        w = torch.ones(x.shape[-2], dtype=x.dtype) if weight is None else weight
        return {"n": w.sum(), "sum": w @ x, "outer": (x * w.unsqueeze(-1)).mT @ x}

    def _join(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: a[name] + b[name] for name in self.parts}

    def _finish(self, state: dict[str, Tensor]) -> Tensor:
        mean = state["sum"] / state["n"]
        return state["outer"] / state["n"] - mean.unsqueeze(-1) * mean.unsqueeze(-2)
