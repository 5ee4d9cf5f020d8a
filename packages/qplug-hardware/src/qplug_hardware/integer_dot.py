"""Dot products of blocks in integers alone: what a processing element for BFP and BBFP computes, bit by bit.

Of two elements the hardware multiplies the mantissas (2m bits), moves the product up by d for each flag, gives it the exclusive or of the signs,
and adds it to the block's accumulator; once for a pair of blocks it adds the two shared exponents.  Nothing here is rounded: the sum of a block
equals the dot product of the decoded values exactly.

Source: BBAL, https://arxiv.org/abs/2504.15721, section 3; GSE: GSQ-Tuning, https://arxiv.org/abs/2502.12913, section 3
"""

from math import ceil, log2

import torch
from qcore.errors import SpecError
from qcore.numbers import NumberFormat, QTensor
from qcore.numbers.granularity import to_blocks
from torch import Tensor

from qplug_hardware.block_float import BBFP, BFP


def accumulator_bits(a: NumberFormat, b: NumberFormat, block: int) -> int:
    """Bits of the magnitude of a sum of `block` products; a signed accumulator has one more.

    m_a + m_b + d_a + d_b + log2(block), rounded up: 17 for BBFP(4,2) with itself and blocks of 32, 13 for BFP(4), 19 for BFP(7) (GSE-INT8).
    """
    (m, d), (n, e) = _windows(a), _windows(b)
    return m + n + d + e + ceil(log2(block))


def fields(codes: Tensor, fmt: NumberFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Sign bit, flag and mantissa of codes.  [...] → three of that shape, int64"""
    m, _ = _windows(fmt)
    c, flags = codes.long(), int(isinstance(fmt, BBFP))
    return c >> (m + flags), (c >> m) & flags, c & ((1 << m) - 1)


def block_dots(a: QTensor, b: QTensor) -> tuple[Tensor, Tensor]:
    """The dot products of all rows of `a` with all rows of `b`, block by block.

    a: [R, K];  b: [S, K], with blocks of the same columns, each of one row
    return: sums [R, S, G] int64 and exponents [R, S, G] int64; a block's product is sum · 2^exponent
    SpecError for other formats, other blocks, and sums that 63 bits may not hold
    """
    if a.shape[-1:] != b.shape[-1:] or len(a.shape) != 2 or len(b.shape) != 2 or a.block != b.block or a.block[0] != 1:
        raise SpecError(f"blocks of {a.block} in {a.shape} do not meet blocks of {b.block} in {b.shape}: both need rows [.., K] with the same groups")
    width = accumulator_bits(a.spec.format, b.spec.format, a.block[1])
    if width > 63:
        raise SpecError(f"sums of {a.block[1]} products of {a.spec.format} and {b.spec.format} have {width} bits, more than the 63 of an int64")
    (x, ex), (y, ey) = _integers(a), _integers(b)
    return torch.einsum("rgi,sgi->rsg", x, y), ex.unsqueeze(1) + ey.unsqueeze(0)


def matmul(a: QTensor, b: QTensor) -> Tensor:
    """a bᵀ: integer dot products of blocks, added in float64.  [R, K], [S, K] → [R, S] float64

    Exact as long as what lies between the largest and the smallest bit of a sum over blocks fits float64's 53 bits.
    """
    sums, exponents = block_dots(a, b)
    return torch.ldexp(sums.double(), exponents).sum(-1)


def element_product(x: tuple[int, int, int], y: tuple[int, int, int], shift: tuple[int, int]) -> int:
    """One multiplier: (sign, flag, mantissa) of two elements → their signed product, in units of both blocks' lowest steps.

    shift: d of each format
    """
    size = (x[2] * y[2]) << (shift[0] * x[1] + shift[1] * y[1])
    return -size if x[0] ^ y[0] else size


def _windows(fmt: NumberFormat) -> tuple[int, int]:
    """m and d."""
    if isinstance(fmt, BBFP):
        return fmt.mantissa, fmt.shift
    if isinstance(fmt, BFP):
        return fmt.mantissa, 0
    raise SpecError(f"integer dot products are of bfp and bbfp, got {fmt}")


def _integers(q: QTensor) -> tuple[Tensor, Tensor]:
    """Elements as integers [R, G, B] in steps of 2^exponent, and those exponents [R, G]."""
    m, d = _windows(q.spec.format)
    sign, flag, size = fields(q.codes, q.spec.format)
    value = torch.where(sign == 1, -size, size) << (d * flag)
    half, exponent = torch.frexp(q.scale().double())
    if bool((half != 0.5).any()):
        raise SpecError(f"{q.spec} has scales that are no powers of two: its blocks share no exponent")
    return to_blocks(value, q.block), exponent.long() - 1 - (m - 1)
