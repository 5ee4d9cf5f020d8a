"""Exact integer products under per-token and per-channel scales."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require


def require_operands(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> None:
    """ValueError where `int8_linear` would not take them."""
    require("x", x, (None, None), (torch.int8,))
    require("w", w, (None, x.shape[1]), (torch.int8,), x)
    require("x_scale", x_scale, (x.shape[0], 1), FLOATING, x)
    if w_scale.numel() != 1:
        require("w_scale", w_scale, (w.shape[0],), FLOATING, x)


def int8_linear(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """y[t, n] = (Σₖ x[t, k] · w[n, k]) · x_scale[t] · w_scale[n]

    x:       [T, K] int8      x_scale: [T, 1] float32
    w:       [N, K] int8      w_scale: [N] float32
    return:  [T, N] float32; the sum is exact, the two products round in float32, the token's scale first
    """
    require_operands(x, w, x_scale, w_scale)
    # float64 holds every partial sum exactly: |sum| <= K · 2^14 < 2^53
    total = (x.double() @ w.double().T).to(torch.int32)
    return total.float() * x_scale * w_scale
