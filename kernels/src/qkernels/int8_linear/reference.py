"""Exact integer products under per-token and per-channel scales."""

import torch
from torch import Tensor


def int8_linear(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """y[t, n] = (Σₖ x[t, k] · w[n, k]) · x_scale[t] · w_scale[n]

    x:       [T, K] int8      x_scale: [T, 1] float32
    w:       [N, K] int8      w_scale: [N] float32
    return:  [T, N] float32; the sum is exact, the two products round in float32, the token's scale first
    """
    # float64 holds every partial sum exactly: |sum| <= K · 2^14 < 2^53
    total = (x.double() @ w.double().T).to(torch.int32)
    return total.float() * x_scale * w_scale
