"""Fake quantization that lets gradients through: what a learned transform sees of the numbers that will be stored."""

import torch
from torch import Tensor

from qcore.numbers import Int, Offset, QuantSpec, fake_quantize
from qcore.numbers.tensor import offset_part


def fake_quantize_through(x: Tensor, spec: QuantSpec) -> Tensor:
    """`fake_quantize` of rows [..., K] whose gradient is that of x + s·r, with the rounding error r (in steps s) held constant.

    So a value's own gradient passes unchanged (straight-through), and the step's goes to the smallest and largest value that set it: where they
    come closer, every other value's error shrinks.  Integers whose scales belong to a row or a part of one are treated so; for everything else the
    step is held constant too.

    Source: https://arxiv.org/abs/1308.3432 for the first part, https://arxiv.org/abs/1902.08153 (LSQ), equation 3, for the step.
    """
    fmt, block = spec.format, spec.granularity.block(tuple(x.shape))
    plain = isinstance(fmt, Int) and fmt.bits > 1 and spec.scaled and spec.offset is not Offset.VALUE and not isinstance(spec.scale, QuantSpec)
    if not plain or any(b != 1 for b in block[:-1]):
        with torch.no_grad():
            error = fake_quantize(x.detach().reshape(-1, x.shape[-1]), spec).reshape(x.shape) - x
        return x + error
    blocks = x.unflatten(-1, (-1, block[-1]))
    low = blocks.amin(-1, keepdim=True).clamp(max=0.0)
    high = blocks.amax(-1, keepdim=True).clamp(min=0.0)
    if spec.offset is Offset.NONE:
        step = high / fmt.hi if fmt.lo >= 0 else torch.maximum(high / fmt.hi, low / fmt.lo)
    else:
        step = (high - low) / (fmt.hi - fmt.lo)
    step = step + (step == 0)
    with torch.no_grad():
        zero = offset_part(low, step, spec).to(x.dtype) if spec.offset is Offset.CODE else 0.0
        z = blocks / step
        error = ((z + zero).round_().clamp_(fmt.lo, fmt.hi) - zero).sub_(z)
    return (blocks + step * error).reshape(x.shape)
