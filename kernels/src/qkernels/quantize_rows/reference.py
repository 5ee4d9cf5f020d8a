"""Symmetric int8 codes of rows, one scale a row or one given for all."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require, require_one


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """codes = round(x / scale), ties to even, clipped to -128 … 127.

    x:      [T, K] float
    scale:  one float32 for all rows; None = the smallest that lets both ends of the row fit, max(high / 127, -low / 128), and 1 for a row of zeros
    return: codes [T, K] int8, scale [T, 1] float32
    """
    require("x", x, (None, None), FLOATING)
    if scale is not None:
        require_one("scale", scale, FLOATING, x)
    x = x.float()
    if not torch.isfinite(x).all():
        raise ValueError("x: holds NaN or infinity, for which there is no int8 code; allowed: finite values")
    if scale is None:
        zero = x.new_zeros(x.shape[0], 1)
        high = torch.cat([x, zero], 1).amax(1, keepdim=True)
        low = torch.cat([x, zero], 1).amin(1, keepdim=True)
        s = torch.maximum(high / 127, low / -128)
        s = torch.where(high - low <= 0, 1.0, s)
    else:
        s = scale.float().reshape(1, 1).expand(x.shape[0], 1).clone()
    z = torch.where(s == 0, 0.0, x / torch.where(s == 0, 1.0, s))
    return z.clamp(-128, 127).round().to(torch.int8), s
