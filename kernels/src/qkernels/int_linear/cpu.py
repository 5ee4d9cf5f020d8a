"""The same from panels: bytes are multiplied and added as integers, and scaled once a group."""

from torch import Tensor

from qkernels import native
from qkernels.panels import Panels


def int_linear(x: Tensor, w: Panels, x_scale: Tensor | None = None, *, isa: str | None = None) -> Tensor:
    """As `reference.int_linear`, with float32 sums over the groups.  x [..., K] float → [..., N], x.dtype

    x_scale: one float32, of static inputs
    isa:     one of `native.instruction_sets()`; None = the best
    """
    return native.linear(x, w.codes, w.scale, w.shift, w.shape, w.group, w.bits, int8_inputs=True, x_scale=x_scale, isa=isa)
