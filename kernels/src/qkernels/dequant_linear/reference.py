"""The meaning of a linear layer with a stored weight: give every code its value, then multiply."""

import torch.nn.functional as F
from torch import Tensor

from qkernels._check import FLOATING, INTEGERS, require


def dequantize_blocks(
    values: Tensor, scale: Tensor, block: tuple[int, ...], zero_point: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """(values - zero_point) · scale + offset, in float32.

    values:     [d0, d1, …] the numbers that the codes stand for at scale 1, integer or float
    block:      how many values share one scale along each axis; blocks at the edges may be smaller
    scale, zero_point, offset: one per block, [ceil(d0 / b0), ceil(d1 / b1), …]
    """
    shape = tuple(values.shape)
    blocks = tuple(-(-d // b) for d, b in zip(shape, block, strict=True))
    for name, t in (("scale", scale), ("zero_point", zero_point), ("offset", offset)):
        if t is not None:
            require(name, t, blocks, (*FLOATING, *INTEGERS), values)
    even = all(d % b == 0 for d, b in zip(shape, block, strict=True))
    # blocks that divide the shape need no copy of the scale for each value: [g0, b0, g1, b1, …] against [g0, 1, g1, 1, …]
    lay = _beside_blocks if even else _spread
    out = values.float()
    if even:
        out = out.reshape([n for d, b in zip(shape, block, strict=True) for n in (d // b, b)])
    if zero_point is not None:
        out = out - lay(zero_point.float(), block, shape)
    out = out * lay(scale.float(), block, shape)
    if offset is not None:
        out = out + lay(offset.float(), block, shape)
    return out.reshape(shape)


def dequant_linear(
    x: Tensor, values: Tensor, scale: Tensor, block: tuple[int, int], zero_point: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """y = x @ Ŵᵀ, Ŵ rounded once to x's dtype, as a consumer does that decompresses at load.

    x:      [..., K] float
    values: [N, K], with scale, zero_point and offset as in `dequantize_blocks`
    return: [..., N], x.dtype
    """
    require("x", x, (..., values.shape[-1]), FLOATING, values)
    return F.linear(x, dequantize_blocks(values, scale, block, zero_point, offset).to(x.dtype))


def _beside_blocks(s: Tensor, block: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """[g0, g1, …] → [g0, 1, g1, 1, …]"""
    return s.reshape([n for g in s.shape for n in (g, 1)])


def _spread(s: Tensor, block: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Repeat one value per block over its block; an axis with one block is left to broadcasting."""
    for i, (b, d) in enumerate(zip(block, shape, strict=True)):
        if s.shape[i] > 1 and b > 1:
            s = s.repeat_interleave(b, dim=i).narrow(i, 0, d)
    return s
