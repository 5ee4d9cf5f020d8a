"""Weight-only integers: decode, multiply, add in float32."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require, require_groups


def dequantize(codes: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """code · scale + shift.

    codes:  [N, K] int8
    scale:  [N, K/G] float, one for G consecutive inputs;  shift: alike, or None
    return: [N, K] float32
    """
    require("codes", codes, (None, None), (torch.int8,))
    require("scale", scale, (codes.shape[0], None), FLOATING, codes)
    group = require_groups("scale", scale.shape[1], codes.shape[1])
    if shift is not None:
        require("shift", shift, tuple(scale.shape), FLOATING, codes)
    w = codes.float() * scale.float().repeat_interleave(group, 1)
    return w if shift is None else w + shift.float().repeat_interleave(group, 1)


def weight_linear(x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """y = x @ (codes · scale + shift)ᵀ, inputs and weight as float32, sums in float32, rounded once to x's dtype.

    x:      [..., K] float
    codes, scale, shift: as in `dequantize`
    return: [..., N], x.dtype
    """
    require("x", x, (..., codes.shape[-1]), FLOATING, codes)
    return torch.nn.functional.linear(x.float(), dequantize(codes, scale, shift)).to(x.dtype)
