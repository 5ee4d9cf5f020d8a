"""The same through oneDNN, as torch brings it (`torch.ops.onednn.qconv_pointwise`): VNNI or AMX, where the processor has them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.int8_conv.reference import require_operands


def missing() -> str | None:
    """Why this torch or this processor cannot run it without loss; None where it can.

    Without VNNI oneDNN adds pairs of uint8 × int8 products in 16 bits, which saturate at 32767: 255 · 127 + 255 · 127 is 64770.
    """
    if not hasattr(torch.ops.onednn, "qconv_prepack") or not hasattr(torch.ops.onednn, "qconv_pointwise"):
        return "this torch has no onednn.qconv_pointwise"
    return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"


def saturates() -> bool:
    """Whether pairs of products may saturate on this processor, unless the weights have 7 bits or fewer."""
    return not torch.cpu._is_vnni_supported()


def prepack(
    w: Tensor, w_scale: Tensor, x_scale: float, x_zero: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """The weight [N, C/groups, kh, kw] int8 in oneDNN's own layout; the sums that the zero point needs are made here."""
    packed: Tensor = torch.ops.onednn.qconv_prepack(w, w_scale, x_scale, x_zero, list(stride), list(padding), list(dilation), groups, None)
    return packed


def int8_conv(
    x: Tensor,
    packed: Tensor,
    x_scale: float,
    x_zero: int,
    w_scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """As `reference.int8_conv` of two spatial axes, to the rounding of float32; packed: from `prepack`"""
    require_operands(x, x.shape[1], w_scale)
    zeros = torch.zeros(w_scale.shape[0], dtype=torch.int32)
    y: Tensor = torch.ops.onednn.qconv_pointwise(
        x, x_scale, x_zero, packed, w_scale, zeros, None, list(stride), list(padding), list(dilation), groups, 1.0, 0, torch.float32, "none", [], ""
    )
    return y
