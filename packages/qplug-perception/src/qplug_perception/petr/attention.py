"""Multi-head attention of PETR's decoder, with q, k, v and the projections as layers of their own, and taps where methods look.

The release has torch.nn.MultiheadAttention, whose projections are one fused parameter that no hook sees: `released.py` takes it apart.
"""

import torch
from qcore.errors import SpecError
from qcore.model.tap import tap
from torch import Tensor, nn


class Attention(nn.Module):
    """softmax(q·kᵀ / √D)·v, tapped at "scores" [B, H, T, S], the softmax's input, and at "p", what comes out.

    The softmax is a module, so that another one can take its place (`qans.py`).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.softmax = nn.Softmax(-1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor:
        """query: [B, T, C];  key, value: [B, S, C];  padding: [B, S] bool, True where nothing is to be attended to"""
        q, k, v = (self._heads(proj(x)) for proj, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value)))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if padding is not None:
            if bool(padding.all(-1).any()):
                raise SpecError("all pixels of a sample are padding; nothing is left to attend to")
            scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
        p = tap(self, "p", self.softmax(tap(self, "scores", scores)))
        return self.out_proj((self.dropout(p) @ v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, C] → [B, H, T, C / H]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
