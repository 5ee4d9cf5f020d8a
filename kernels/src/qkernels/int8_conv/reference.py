"""Exact integer convolutions under one scale of the input and one scale per output channel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels._check import require

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def require_operands(x: Tensor, channels: int, w_scale: Tensor) -> None:
    """ValueError where `int8_conv` would not take them."""
    require("x", x, (None, channels, *[None] * (x.dim() - 2)), (torch.uint8,))
    require("w_scale", w_scale, (None,), (torch.float32,), x)


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
    require_operands(x, w.shape[1] * groups, w_scale)
    require("w", w, (w_scale.shape[0], None, *[None] * (x.dim() - 2)), (torch.int8,), x)
    # float64 holds every partial sum exactly: |sum| <= K · 255 · 128 < 2^53
    total = _CONV[w.ndim - 2](x.double() - x_zero, w.double(), None, tuple(stride), tuple(padding), tuple(dilation), groups)
    return total.float() * (w_scale * x_scale).reshape(-1, *[1] * (w.ndim - 2))
