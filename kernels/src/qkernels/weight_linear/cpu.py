"""The same from panels, decoded in registers; no value of the weight is ever stored."""

from torch import Tensor

from qkernels import native
from qkernels.panels import Panels


def weight_linear(x: Tensor, w: Panels, *, isa: str | None = None) -> Tensor:
    """As `reference.weight_linear`, but for the order of the float32 additions.  x [..., K] float → [..., N], x.dtype

    isa: one of `native.instruction_sets()`; None = the best
    """
    return native.linear(x, w.codes, w.scale, w.shift, w.shape, w.group, w.bits, int8_inputs=False, isa=isa)
