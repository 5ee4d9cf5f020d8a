"""Integers with dyadic scales: (codes - zp)·m / 2^k, where m and k are small integers, so that every change of scale is a product and a shift.

A scale that is stored as bfloat16 *is* such a number: eight significant bits are an m of 128 … 255, and the exponent is k.  So codes that were chosen
under bfloat16 scales come here without another rounding.

`Dyadic` is what is stored or multiplied: few bits, one scale for each row (a token, or an output channel of a weight).  `Wide` is what an operator
makes before it is cut to few bits again: x·m / 2^k in int64, zero at zero.  `aligned` brings values of different scales to one, `requantize` cuts.

Source: I-LLM, https://arxiv.org/abs/2405.17849, section 3.3.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from qcore.errors import SpecError
from qcore.numbers import Int, Offset, QTensor
from torch import Tensor

from qplug_llm.illm.rounding import divide_half_away, log2_floor, msb, shift_right

LIMIT = 40  # bits of values that are to be requantized: times 16-bit levels they stay inside int64


@dataclass(frozen=True)
class Dyadic:
    """A quantized tensor of value (codes - zp)·m / 2^k.

    codes:    [..., R, C] integers of any width
    m, k, zp: [..., R, 1] int64, one for each row; 128 ≤ m ≤ 255 where the row was requantized
    bits:     of a code: |codes - zp| < 2^bits
    """

    codes: Tensor
    m: Tensor
    k: Tensor
    zp: Tensor
    bits: int

    def centred(self) -> Tensor:
        """codes - zp, int64."""
        return self.codes.long() - self.zp

    def wide(self) -> "Wide":
        return Wide(self.centred(), self.m, self.k)

    def dequantize(self) -> Tensor:
        """The float64 values that it stands for; for what lies outside of the integer program."""
        return self.wide().dequantize()


@dataclass(frozen=True)
class Wide:
    """Values x·m / 2^k, before they are cut to few bits.  x: [..., R, C] int64;  m, k: int64 that broadcast with it"""

    x: Tensor
    m: Tensor
    k: Tensor

    def dequantize(self) -> Tensor:
        """The float64 values that it stands for; for what lies outside of the integer program."""
        return torch.ldexp(self.x.double() * self.m.double(), -self.k.double())


def limited(wide: Wide, bits: int = LIMIT) -> Wide:
    """The same values, no |x| of `bits` + 1 bits or more; each row is shifted by itself, and rows that fit are left alone.  m, k: [..., R, 1]"""
    over = (msb(wide.x.abs().amax(-1, keepdim=True)) + 1 - bits).clamp(min=0)
    return Wide(shift_right(wide.x, over), wide.m, wide.k - over)


def aligned(wide: Wide, bits: int = LIMIT) -> Wide:
    """The same values at m = 1 and one k for each row, in `bits` bits: what is 2^bits times smaller than the row's largest rounds to zero.

    A product with weights of one scale *per output channel*, or with cached keys of one scale per token, needs this before a row's extremes
    mean anything; the paper's equations 4 to 8 have one scale for the whole second operand.  Zeros (masked places) do not count.
    m, k: broadcast with x;  |x·m| < 2^63
    """
    x = wide.x * wide.m
    alive = x != 0
    place = msb(x.abs()) - wide.k
    top = torch.where(alive, place, -(2**40)).amax(-1, keepdim=True)
    k = torch.where(alive.any(-1, keepdim=True), bits - 1 - top, 0)
    return Wide(torch.where(alive, shift_right(x, torch.where(alive, wide.k - k, 0)), 0), torch.ones_like(k), k)


def step(delta: Tensor, m: Tensor, k: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(m', k') of the scale delta·m / (levels·2^k), with 128 ≤ m' ≤ 255: equation 8, by an MSB position instead of a logarithm.  delta·m > 0

    Rounding may carry m' to 256, which eight bits do not hold: it is halved then, and k' with it.
    """
    size = delta * m
    shift = log2_floor(256 * levels, size)
    m_new = torch.where(
        shift >= 0,
        divide_half_away(size << shift.clamp(min=0), levels),
        divide_half_away(size, torch.full_like(size, levels) << (-shift).clamp(min=0)),
    )
    full = m_new == 256
    return torch.where(full, 128, m_new), k + shift - full.long()


def requantize(wide: Wide, bits: int, form: Literal["one-rounding", "paper"] = "one-rounding") -> Dyadic:
    """Codes 0 … 2^bits - 1 for each row, by its own minimum and maximum: equations 4 to 8.  m, k: [..., R, 1]; bits ≤ 16

    The range always holds zero.  The paper takes minimum and maximum as they are: a row of 1000 … 1001 then has a zero point of -255,000, 255·127·K
    is no bound of the next product any more, and a constant row divides by zero.  So the only row without a range is that of zeros: codes 0, zp 0.

    form: "one-rounding": code = round(x·Q/Δ) + zp, so zero is exact and every value is within half a step.
          "paper": code = round((x - min)·Q/Δ) beside zp = round(-min·Q/Δ): what the two roundings differ by, up to half a step, is added to all of a
          row, and the next product multiplies it with the sum of a weight's row.  Eight bits hide it, four do not
    """
    wide = limited(wide)
    levels = 2**bits - 1
    low, high = wide.x.amin(-1, keepdim=True).clamp(max=0), wide.x.amax(-1, keepdim=True).clamp(min=0)
    delta = torch.where(high > low, high - low, 1)
    m, k = step(delta, wide.m, wide.k, levels)
    zp = divide_half_away(-low * levels, delta)
    if form == "paper":
        return Dyadic(divide_half_away((wide.x - low) * levels, delta), m, k, zp, bits)
    # a tie at both ends could make the last code one too many
    codes = (divide_half_away(wide.x * levels, delta) + zp).clamp(max=levels)
    return Dyadic(codes, m, k, zp, bits)


# from floats, before the program runs ----------------------------------------------------------------------------------------------------


def dyadic_scale(scale: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """(m, k) of float scales, exactly.  SpecError where a scale has more than eight significant bits, or k does not fit eight bits."""
    mantissa, exponent = torch.frexp(scale.double())
    m = (mantissa * 256).long()
    if not torch.equal(m.double(), mantissa * 256) or bool((m < 0).any()):
        raise SpecError(f'{where}: scales are no dyadic numbers of 8 bits; store them as bfloat16, which is one: scale = "bfloat16"')
    k = torch.where(m == 0, 0, 8 - exponent.long())
    if int(k.amax()) > 127 or int(k.amin()) < -128:
        raise SpecError(f"{where}: scales from {float(scale.amin()):.3g} to {float(scale.amax()):.3g} need exponents beyond 8 bits")
    return m, k


def dyadic_weight(q: QTensor, where: str) -> Dyadic:
    """A matrix [N, K] of integer codes with one bfloat16 scale for each row, as it is stored."""
    fmt = q.spec.format
    assert isinstance(fmt, Int), fmt
    m, k = dyadic_scale(q.scale().reshape(q.shape[0], 1), where)
    zp = q.parts["offset"].long().reshape(q.shape[0], 1) if q.spec.offset is Offset.CODE else torch.zeros_like(m)
    return Dyadic(q.codes, m, k, zp, fmt.bits)


def wide_of(values: Tensor, bits: int = LIMIT) -> Wide:
    """Float values [..., R, C] as integers of `bits` bits, one k for each row."""
    _, exponent = torch.frexp(values.double().abs().amax(-1, keepdim=True))
    k = bits - exponent.long()
    return Wide(torch.ldexp(values.double(), k.double()).round().long(), torch.ones_like(k), k)


def constant(values: Tensor, bits: int) -> Wide:
    """A float vector as signed integers of `bits` bits under one power of two.  [C] → x [C], m and k [1]"""
    wide = wide_of(values.reshape(1, -1), bits - 1)
    # rounding may carry the largest value over the end
    return Wide(wide.x.clamp(max=2 ** (bits - 1) - 1)[0], wide.m[0], wide.k[0])
