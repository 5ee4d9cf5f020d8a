"""Integer products of quantized rows with an integer weight in groups."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require, require_groups
from qkernels.quantize_rows.reference import quantize_rows


def int_linear(x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None = None, x_scale: Tensor | None = None) -> Tensor:
    """y[t, n] = x_scale[t] · Σ_g (scale[n, g] · Σ_k q[t, k] codes[n, k] + shift[n, g] · Σ_k q[t, k]), k over the inputs of group g.

    x:       [..., K] float; q and x_scale are its `quantize_rows`
    codes:   [N, K] int8
    scale:   [N, K/G] float;  shift: alike, or None
    x_scale: one float32 of static inputs; None = one a row
    return:  [..., N], x.dtype; the sums over k are exact, the others are added in float64 here
    """
    require("codes", codes, (None, None), (torch.int8,))
    n, k = codes.shape
    require("x", x, (..., k), FLOATING, codes)
    require("scale", scale, (n, None), FLOATING, codes)
    require_groups("scale", scale.shape[1], k)
    if shift is not None:
        require("shift", shift, tuple(scale.shape), FLOATING, codes)
    groups = scale.shape[1]
    q, s = quantize_rows(x.reshape(-1, k), x_scale)
    by_group = q.double().unflatten(1, (groups, -1))  # [T, groups, G]
    sums = (by_group.transpose(0, 1) @ codes.double().unflatten(1, (groups, -1)).permute(1, 2, 0)).permute(1, 2, 0)  # [T, N, groups]
    total = (sums * scale.double()).sum(-1)
    if shift is not None:
        total = total + by_group.sum(-1) @ shift.double().T
    return (total * s.double()).to(x.dtype).reshape(*x.shape[:-1], n)
