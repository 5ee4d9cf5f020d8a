"""A non-linear unit of tables: segmented by the exponent of a value, looked up by the top bits of its mantissa.  A software model, in integers.

For a function f, an exponent E and one of two halves h, a sub-table holds T[j] = f(±(j + 1/2) · 2^(E - (t-1))), j the top t bits of the mantissa:
2^5 · 2 sub-tables for five exponent bits, of which a block needs those of its own exponents alone.  Entries are unsigned integers of `width` bits
under a power of two for each sub-table.

What the two halves are the paper's digests do not say, so both readings are here: "sign" (E is the value's own exponent, one half for each sign) and
"window" (E is the block's shared exponent, one half for each window; the other sign follows from the function's symmetry).  That E is clamped to its
bits, that a reciprocal's argument is brought to a leading one first, and how the softmax is fixed-point, is inferred too.

Source: BBAL, https://arxiv.org/abs/2504.15721, section 4
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import frexp, inf, ldexp
from typing import Literal

import torch
from qcore.errors import SpecError
from qcore.numbers import QuantSpec, Tile, Unscaled, quantize
from qcore.numbers.granularity import spread, to_blocks
from torch import Tensor

from qplug_hardware.block_float import BBFP, BFP, SharedExponent
from qplug_hardware.integer_dot import fields

BLOCK = 32
ELEMENT = BBFP(10, 5)  # of the paper's unit
FRACTION = 32  # bits behind the point of a softmax's sum: two million terms fit float64's 53 bits, with which a sum's length is counted
FLOOR = -32.0  # e^-32 is below 2^-46: such terms of a softmax are zero, and do not widen their block


@dataclass(frozen=True)
class Function:
    """What a table holds.

    domain:    signs of its arguments; where it is "any", f(-x) = 1 - f(x)
    normalize: whether a mantissa is brought to a leading one before it is looked up, under its own exponent: a reciprocal would need more bits for
               the small mantissas of a block than for all others
    """

    name: str
    of: Callable[[Tensor], Tensor]
    domain: Literal["any", "negative", "positive"]
    normalize: bool = False


FUNCTIONS = {
    f.name: f
    for f in (
        Function("exp", torch.exp, "negative"),
        Function("reciprocal", torch.reciprocal, "positive", normalize=True),
        Function("sigmoid", torch.sigmoid, "any"),
        Function("normal-cdf", torch.special.ndtr, "any"),
    )
}


@dataclass(frozen=True)
class ExponentTable:
    """One function's tables, and the look-up.

    function: "exp" of numbers up to 0, "reciprocal" of positive ones, "sigmoid", "normal-cdf"
    element:  of the values that are looked up; blocks of 32 along the last axis share an exponent
    index:    t, the bits of the mantissa that choose an entry, at most m
    half:     "sign" or "window", see above
    width:    bits of an entry
    """

    function: Literal["exp", "reciprocal", "sigmoid", "normal-cdf"]
    element: BFP | BBFP = ELEMENT
    index: int = 8
    half: Literal["sign", "window"] = "sign"
    width: int = 16

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise SpecError(f"no table is known for {self.function!r}; have: {', '.join(FUNCTIONS)}")
        if not 1 <= self.index <= self.element.mantissa:
            raise SpecError(f"a table is looked up by 1 to m={self.element.mantissa} bits of the mantissa, got index={self.index}")
        if self.half not in ("sign", "window"):
            raise SpecError(f"unknown meaning {self.half!r} of the two halves; have: sign, window")
        if not 2 <= self.width <= 24:
            raise SpecError(f"entries have 2 to 24 bits, got width={self.width}")

    @property
    def exponents(self) -> SharedExponent:
        return SharedExponent(5)

    @property
    def total_bytes(self) -> int:
        """Of all 2^5 · 2 sub-tables."""
        return self.bytes_of(1 << self.exponents.bits)

    def bytes_of(self, exponents: int) -> int:
        """Of the sub-tables of so many exponents: exponents · 2 · 2^t entries."""
        return -(-exponents * 2 * (1 << self.index) * self.width // 8)

    def bytes_on_chip(self, x: Tensor) -> int:
        """Of the sub-tables that the most demanding block of `x` needs at a time."""
        e, _, _, _ = self._places(x)
        blocks = to_blocks(e.reshape(-1, x.shape[-1]) - self.exponents.lowest + 1, (1, BLOCK))  # zeros fill up the last block
        return self.bytes_of(max(len(set(b) - {0}) for b in blocks.reshape(-1, BLOCK).tolist()))

    def fixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Entries and their binary points: f(x) ≈ entry · 2^-point.  [..., K] float → two of that shape, int64

        SpecError for NaN, infinity, and signs outside the function's domain
        """
        f = FUNCTIONS[self.function]
        if (f.domain == "negative" and bool((x > 0).any())) or (f.domain == "positive" and bool((x <= 0).any())):
            raise SpecError(f"the table of {f.name} is for {f.domain} numbers, got {float(x.max() if f.domain == 'negative' else x.min()):.4g}")
        e, h, j, negative = self._places(x)
        entries, points = _tables(self)
        row = e - self.exponents.lowest
        entry, point = entries[row, h, j], points[row, h]
        if self.half == "window" and f.domain == "any":
            # f(-x) = 1 - f(x), in the units of the entry
            entry = torch.where(negative, (torch.ones_like(point) << point) - entry, entry)
        return entry, point

    def __call__(self, x: Tensor) -> Tensor:
        """f(x) by look-up.  [..., K] → [..., K] float32"""
        entry, point = self.fixed(x)
        return torch.ldexp(entry.double(), -point).float()

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Exponent, half and index of each value's entry, and whether the value is negative."""
        rows = x.reshape(-1, x.shape[-1])
        q = quantize(rows, block_spec(self.element))
        sign, flag, size = fields(q.codes, self.element)
        shared = torch.frexp(spread(q.scale().double(), q.block, q.shape).expand(q.shape))[1].long() - 1
        shift = self.element.shift if isinstance(self.element, BBFP) else 0
        j = size >> (self.element.mantissa - self.index)
        f = FUNCTIONS[self.function]
        if f.domain == "negative":
            sign = torch.ones_like(sign)
        if f.normalize:
            step = shared - (self.element.mantissa - 1) + shift * flag
            places = (*_normalized(size, step, self), sign == 1)
        elif self.half == "window":
            places = (shared, flag, j, sign == 1)
        else:
            own = shared + shift * flag
            top = self.exponents.highest
            places = (own.clamp(max=top), sign, torch.where(own > top, (1 << self.index) - 1, j), sign == 1)
        e, h, j, negative = (p.reshape(x.shape) for p in places)
        return e, h, j, negative


def _normalized(size: Tensor, step: Tensor, table: ExponentTable) -> tuple[Tensor, Tensor, Tensor]:
    """Exponent, half and index of whole numbers in steps of 2^step; what lies outside the exponents takes the nearest entry."""
    length = torch.frexp(size.clamp(min=1).double())[1].long()  # exact up to 53 bits
    j = _shifted(size.clamp(min=1), table.index - length, floor=True)
    e = length - 1 + step
    low, high = table.exponents.lowest, table.exponents.highest
    j = torch.where(e < low, 1 << (table.index - 1), torch.where(e > high, (1 << table.index) - 1, j))
    return e.clamp(low, high), torch.zeros_like(e), j


@lru_cache(maxsize=32)
def _tables(table: ExponentTable) -> tuple[Tensor, Tensor]:
    """All entries [exponents, 2, 2^t] and their binary points [exponents, 2], int64."""
    f, t = FUNCTIONS[table.function], table.index
    shift = table.element.shift if isinstance(table.element, BBFP) else 0
    # where all bits of a mantissa are looked up an entry stands for one number, else for the middle of what it covers
    j = torch.arange(1 << t).double() + (0.5 if t < table.element.mantissa or f.normalize else 0.0)
    entries, points = [], []
    for e in range(table.exponents.lowest, table.exponents.highest + 1):
        for h in range(2):
            by_sign = table.half == "sign" or f.normalize
            negative = h == 1 if by_sign else f.domain == "negative"
            argument = torch.ldexp(-j if negative else j, torch.tensor(e + (0 if by_sign else shift * h) - (t - 1)))
            # what the domain leaves out is never looked up: a half, and mantissas without a leading one
            out = torch.full_like(j, negative == (f.domain == "positive") and f.domain != "any", dtype=torch.bool)
            out |= (torch.arange(1 << t) < 1 << (t - 1)) & f.normalize
            value = torch.where(out, 0.0, f.of(argument))
            point = _point(float(value.max()), table.width)
            if table.half == "window" and f.domain == "any":
                point = min(point, table.width - 1)  # 1 - y needs a place for the one
            point = min(point, 62)
            entries.append(torch.ldexp(value, torch.tensor(point)).round().long())
            points.append(point)
    shape = (-1, 2)
    return torch.stack(entries).unflatten(0, shape), torch.tensor(points).unflatten(0, shape)


def _point(largest: float, width: int) -> int:
    """The bits behind the point with which numbers up to `largest`, rounded, just fit `width` bits; 0 where all are zero."""
    if not largest:
        return 0
    point = width - frexp(largest)[1]
    return point - 1 if round(ldexp(largest, point)) >= 1 << width else point


def block_spec(element: BFP | BBFP) -> QuantSpec:
    """Blocks of 32 along the rows of a matrix; the last one of a row may be shorter."""
    return QuantSpec(format=element, granularity=Tile(1, BLOCK), scale=QuantSpec(format=SharedExponent(5), granularity=Unscaled()))


def encoded(x: Tensor, element: BFP | BBFP) -> Tensor:
    """`x` as the unit puts it out: values of blocks along the last axis.  [..., K] float32"""
    rows = x.reshape(-1, x.shape[-1])
    return quantize(rows, block_spec(element)).dequantize().reshape(x.shape)


def silu(x: Tensor, gate: ExponentTable | None = None) -> Tensor:
    """x · sigmoid(x), the sigmoid from a table, in and out as blocks.  [..., K] → [..., K] float32"""
    gate = gate or ExponentTable("sigmoid")
    return encoded(encoded(x, gate.element) * gate(x), gate.element)


def gelu(x: Tensor, gate: ExponentTable | None = None) -> Tensor:
    """x · Φ(x), Φ from a table, in and out as blocks.  [..., K] → [..., K] float32"""
    gate = gate or ExponentTable("normal-cdf")
    return encoded(encoded(x, gate.element) * gate(x), gate.element)


def softmax(x: Tensor, exp: ExponentTable | None = None) -> Tensor:
    """Over the last axis: largest taken off, exponentials from a table, summed in integers, times a reciprocal from a table, out as blocks.

    x: [..., K], where -inf (a mask) and whatever lies 32 below the largest becomes zero; a row must have one finite number
    return: [..., K] float32, whose rows sum to 1 but for the tables' error
    """
    exp = exp or ExponentTable("exp")
    if exp.function != "exp":
        raise SpecError(f"a softmax looks exponentials up, got a table of {exp.function!r}")
    top = x.amax(-1, keepdim=True).float()
    if not bool(torch.isfinite(top).all()) or bool(torch.isnan(x).any()):
        raise SpecError("a row of a softmax has NaN, +inf, or nothing but -inf; mend the mask or what is before it")
    away = x.float() - top
    alive = away >= FLOOR
    entry, point = exp.fixed(torch.where(alive, away, 0.0))
    term = torch.where(alive, _shifted(entry, FRACTION - point), 0)
    total = term.sum(-1, keepdim=True)
    inverse, inverse_point = _reciprocal(total, exp)
    return encoded(torch.ldexp(term.double() * inverse.double(), -(inverse_point + FRACTION)).float(), exp.element)


def _reciprocal(total: Tensor, like: ExponentTable) -> tuple[Tensor, Tensor]:
    """1 / (total · 2^-FRACTION) out of the table: a sum is normalised, so its exponent and top t bits choose the entry.  int64"""
    table = ExponentTable("reciprocal", like.element, like.index, "sign", like.width)
    e, h, j = _normalized(total, torch.full_like(total, -FRACTION), table)
    entries, points = _tables(table)
    row = e - table.exponents.lowest
    return entries[row, h, j], points[row, h]


def _shifted(value: Tensor, by: Tensor, floor: bool = False) -> Tensor:
    """value · 2^by for non-negative integers, halves rounded up unless `floor`."""
    right = (-by).clamp(0, 62)
    half = torch.zeros_like(right) if floor else torch.where(right > 0, torch.ones_like(right) << (right - 1).clamp(min=0), 0)
    return torch.where(by >= 0, value << by.clamp(min=0), (value + half) >> right)


@dataclass(frozen=True)
class UniformTable:
    """What a segmented table is compared with: as many entries, evenly spaced from `low` to `high`; values beyond take the ends."""

    function: str
    low: float
    high: float
    entries: int
    width: int = 16

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS or not -inf < self.low < self.high < inf or self.entries < 1:
            raise SpecError(f"a uniform table needs a known function, a finite range and entries, got {self}")

    def __call__(self, x: Tensor) -> Tensor:
        """f(x) by look-up.  float32"""
        step = (self.high - self.low) / self.entries
        value = FUNCTIONS[self.function].of(self.low + (torch.arange(self.entries).double() + 0.5) * step)
        point = _point(float(value.max()), self.width)
        entry = torch.ldexp(value, torch.tensor(point)).round()
        j = ((x.double() - self.low) / step).floor().clamp(0, self.entries - 1).long()
        return torch.ldexp(entry[j], torch.tensor(-point)).float()
