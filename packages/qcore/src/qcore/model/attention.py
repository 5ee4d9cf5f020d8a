"""Attention written out, with its tensors tapped: q, k, v, and the probabilities p between the two products.

For adapters and models whose attention does not route through a library's own seam, and for formats of the probabilities, which fused kernels never
show.  Tapped tensors are laid out by token, as the inputs of linear layers are: q, k and v as [B, T, H·D] (head by head), p as [B, T, H, S].
"""

import torch
from torch import Tensor, nn

from qcore.model.tap import tap
from qcore.model.topology import Site

TAPS = ("q", "k", "v", "p")


def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scaling · q kᵀ + bias) v, with q, k, v and p tapped at `module`.

    q:      [B, H, T, D]
    k, v:   [B, H, S, D]
    bias:   added to the scores; broadcasts against [B, H, T, S]
    return: [B, H, T, D]
    """
    q, k, v = (_by_token(module, name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    scores = (q @ k.transpose(-1, -2)) * scaling
    if bias is not None:
        scores = scores + bias
    p = torch.softmax(scores, dim=-1)
    p = tap(module, "p", p.transpose(1, 2)).transpose(1, 2)
    return p @ v


def attention_sites(path: str) -> tuple[Site, ...]:
    """The activation sites that `attention` taps at the module of this path."""
    return tuple(Site(path, name) for name in TAPS)


def _by_token(module: nn.Module, name: str, x: Tensor) -> Tensor:
    heads = x.shape[1]
    return tap(module, name, x.transpose(1, 2).flatten(2)).unflatten(2, (heads, -1)).transpose(1, 2)
