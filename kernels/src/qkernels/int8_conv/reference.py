"""Exact integer convolutions under one scale of the input and one scale per output channel."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def int8_conv(
    x: Tensor,
    w: Tensor,
    x_scale: float,
    x_zero: int,
    w_scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y[b, n, p] = x_scale · w_scale[n] · Σ (x[b, c, p'] - x_zero) · w[n, c, k]; what is padded has the code x_zero, the number 0

    x:       [B, C, *spatial] uint8      x_scale, x_zero: (code - x_zero) · x_scale is the number
    w:       [N, C/groups, *kernel] int8      w_scale: [N] float32
    return:  [B, N, *spatial] float32; the sum is exact, the two scales are multiplied first
    """
    # float64 holds every partial sum exactly: |sum| <= K · 255 · 128 < 2^53
    total = _CONV[w.ndim - 2](x.double() - x_zero, w.double(), None, tuple(stride), tuple(padding), tuple(dilation), groups)
    return total.float() * (w_scale * x_scale).reshape(-1, *[1] * (w.ndim - 2))
