"""The same through torch's integer matrix product, which uses VNNI or AMX where the processor has them."""

import torch
from torch import Tensor

from qkernels.int8_linear.reference import require_operands


def int8_linear(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """As `reference.int8_linear`, bit for bit: the integer sums are exact in both."""
    require_operands(x, w, x_scale, w_scale)
    return torch._int_mm(x, w.t()).float() * x_scale * w_scale
