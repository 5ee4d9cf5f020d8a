"""Each expert's rows through its own weight."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require
from qkernels.weight_linear.reference import weight_linear


def grouped_linear(x: Tensor, ends: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """y[t] = x[t] @ (codes[e] · scale[e] + shift[e])ᵀ, e the expert of row t.

    x:      [T, K] float, rows of expert 0 first, then those of expert 1 …; rows behind the last end go to no expert, and their y is 0
    ends:   [E] int32, where the rows of each expert end
    codes:  [E, N, K] int8
    scale:  [E, N, K/G] float
    shift:  alike, or None
    return: [T, N], x.dtype
    """
    require("x", x, (None, None), FLOATING)
    require("codes", codes, (None, None, x.shape[1]), (torch.int8,), x)
    require("ends", ends, (codes.shape[0],), (torch.int32,), x)
    require("scale", scale, (*codes.shape[:2], None), FLOATING, x)
    if shift is not None:
        require("shift", shift, tuple(scale.shape), FLOATING, x)
    if (torch.diff(ends, prepend=ends.new_zeros(1)) < 0).any() or int(ends[-1]) > x.shape[0]:
        raise ValueError(f"ends: is {ends.tolist()}; allowed: ascending numbers up to the {x.shape[0]} rows of x")
    pieces, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        pieces.append(weight_linear(x[start:end], codes[expert], scale[expert], None if shift is None else shift[expert]))
        start = end
    return torch.cat([*pieces, x.new_zeros(x.shape[0] - start, codes.shape[1])])
