"""FP4 weights: decode, multiply, add in float32."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require, require_groups, require_one

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 … 7; bit 3 is the sign


def scale_values(scale: Tensor) -> Tensor:
    """The numbers that stored block scales stand for, float32: uint8 is E8M0 (2^(code - 127)), float8_e4m3fn is itself."""
    return torch.exp2(scale.float() - 127) if scale.dtype is torch.uint8 else scale.float()


def dequantize(packed: Tensor, scale: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
    """[N, K] float32.

    packed:       [N, K/2] uint8, low nibble first
    scale:        [N, K/32] uint8 (MXFP4) or [N, K/16] float8_e4m3fn (NVFP4)
    tensor_scale: one float32 that multiplies all (NVFP4), or None
    """
    require("packed", packed, (None, None), (torch.uint8,))
    k = 2 * packed.shape[1]
    require("scale", scale, (packed.shape[0], None), (torch.uint8, torch.float8_e4m3fn), packed)
    require_groups("scale", scale.shape[1], k)
    if tensor_scale is not None:
        require_one("tensor_scale", tensor_scale, FLOATING, packed)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
    sign = 1.0 - 2.0 * (codes >> 3)
    values = sign * torch.tensor(E2M1, device=packed.device)[codes & 7]
    w = values * scale_values(scale).repeat_interleave(values.shape[1] // scale.shape[1], 1)
    return w if tensor_scale is None else w * tensor_scale.float()


def fp4_linear(x: Tensor, packed: Tensor, scale: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
    """y = x @ dequantize(packed, scale, tensor_scale)ᵀ, in float32, rounded once to x's dtype.  x [..., K] → [..., N]"""
    require("x", x, (..., 2 * packed.shape[-1]), FLOATING, packed)
    return torch.nn.functional.linear(x.float(), dequantize(packed, scale, tensor_scale)).to(x.dtype)
