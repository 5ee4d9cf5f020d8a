"""Block floating point of accelerators: signed mantissas under one shared exponent a block, and BBFP, which keeps two windows of each mantissa.

| class | value at scale 1 | code, high bits first | bits a value, blocks of 32 |
|---|---|---|---|
| BFP(m) | ± M · 2^-(m-1) | sign, M | m + 1 + 5/32 |
| BBFP(m, o) | ± M · 2^-(m-1) · 2^(d · flag), d = m - o | sign, flag, M | m + 2 + 5/32 |
| SharedExponent(5) | 2^(code - 15): 2^-15 … 2^16 | the exponent + bias | |

0 ≤ M < 2^m.  Scale 1 is the shared exponent 0: a block is these numbers times 2^e_s.  In qcore's terms an element is a fixed grid and the shared
exponent is a scale in a format of its own, so rules, solvers, modules and checkpoints take both as they take MX.

GSE-INTb of GSQ-Tuning (https://arxiv.org/abs/2502.12913) is BFP(b - 1) under SharedExponent(5); `gse` says so by name.

Left out: stochastic rounding, which only gradients want, and the two's complement of MXINT8, which is qcore's own `mx(Int(8))`.  It differs from
BFP(7) in one place: a negative value that rounds to -2^m steps stays there, while a signed magnitude ends at -(2^m - 1).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from qcore.errors import SpecError
from qcore.numbers import NumberFormat, PerGroup, PerTensor, PowerOfTwo, QuantSpec, Unscaled
from qcore.numbers.formats import NO_PARAMS, Params
from torch import Tensor

LARGEST = 12  # mantissa bits: sign, flag and mantissa of a code fit an int16, and an integer dot product of 32 of them an int64


def encode_windows(x: Tensor, mantissa: int, shift: int, *, promote: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Sign, flag and mantissa of values in units of 2^e_s: [...] → three of that shape, bool, bool and int32.

    A magnitude of 2 or more, one whose exponent is above e_s, is flagged, and its mantissa counts steps that are 2^shift as large.

    shift:   d = m - o, the exponents between the two windows; 0 is block floating point, whose flag says nothing
    promote: what becomes of a magnitude below 2 that rounds up to 2.  True: it is flagged, which is exact.  False: it is clipped to 2 - 2^-(m-1)

    Source: BBAL, https://arxiv.org/abs/2504.15721, section 3; rounding is to nearest, ties to even.
    """
    top = 1 << mantissa
    steps = x.float().abs() * (top / 2)
    low = steps.round()
    flag = low >= top if promote else steps >= top
    size = torch.where(flag, (steps / (1 << shift)).round(), low).clamp(max=top - 1).int()
    return torch.signbit(x) & (size > 0), flag, size


@dataclass(frozen=True)
class BFP(NumberFormat):
    """± M · 2^-(m-1) with 0 ≤ M < 2^m: elements of block floating point, sign and magnitude, no hidden one.

    mantissa: m, magnitude bits without the sign, 1 to 12
    rounding: "nearest", ties to even, or "truncate": what an aligner does that shifts right and drops the rest (3 to 4 times the squared error)

    Under a shared exponent e = floor(log2 of the largest magnitude) only a value that rounds up to 2^m is clipped, by less than one step.
    """

    name: ClassVar[str] = "bfp"
    mantissa: int
    rounding: Literal["nearest", "truncate"] = "nearest"

    def __post_init__(self) -> None:
        if not 1 <= self.mantissa <= LARGEST:
            raise SpecError(f"block floating point has 1 to {LARGEST} mantissa bits, got mantissa={self.mantissa}")
        if self.rounding not in ("nearest", "truncate"):
            raise SpecError(f"unknown rounding {self.rounding!r} of block floating point; have: nearest, truncate")

    @property
    def label(self) -> str:
        return f"bfp({self.mantissa})"

    @property
    def bits(self) -> int:
        return self.mantissa + 1

    @property
    def hi(self) -> float:
        return 2.0 - 2.0 ** (1 - self.mantissa)

    @property
    def lo(self) -> float:
        return -self.hi

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int16

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        steps = x.float().abs() * 2.0 ** (self.mantissa - 1)
        size = (steps.round() if self.rounding == "nearest" else steps.floor()).clamp(max=(1 << self.mantissa) - 1).int()
        return (size | ((torch.signbit(x) & (size > 0)).int() << self.mantissa)).to(self.code_dtype)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return _values(self.mantissa, 0, 1).to(codes.device)[codes.long()]


@dataclass(frozen=True)
class BBFP(NumberFormat):
    """± M · 2^-(m-1) · 2^(d · flag), d = m - o: block floating point with one window for most values and one d exponents above for the few large.

    mantissa: m, magnitude bits, 1 to 12
    overlap:  o, the bits that both windows have, 0 to m - 1; o = m would be block floating point
    corner:   what becomes of an unflagged value that rounds up to 2^m: "promote" encodes it with the flag, which is exact; "clip" leaves it one step
              below, as a literal reading of the paper does

    The shared exponent is e_max - d, so the largest magnitude is that of BFP(m), and everything below 2^(e_s + 1) has steps 2^d times finer.
    Source: BBAL (DAC 2025), https://arxiv.org/abs/2504.15721, section 3
    """

    name: ClassVar[str] = "bbfp"
    mantissa: int
    overlap: int
    corner: Literal["promote", "clip"] = "promote"

    def __post_init__(self) -> None:
        if not 1 <= self.mantissa <= LARGEST:
            raise SpecError(f"BBFP has 1 to {LARGEST} mantissa bits, got mantissa={self.mantissa}")
        if not 0 <= self.overlap < self.mantissa:
            raise SpecError(
                f"the windows of BBFP overlap in 0 to m - 1 bits, got mantissa={self.mantissa}, overlap={self.overlap}; "
                "with overlap = mantissa the flag says nothing: use format 'bfp'"
            )
        if self.corner not in ("promote", "clip"):
            raise SpecError(f"unknown rule {self.corner!r} for values that round past the low window of BBFP; have: promote, clip")

    @property
    def shift(self) -> int:
        """d = m - o: by how many exponents the high window lies above the low one."""
        return self.mantissa - self.overlap

    @property
    def label(self) -> str:
        return f"bbfp({self.mantissa},{self.overlap})"

    @property
    def bits(self) -> int:
        return self.mantissa + 2

    @property
    def hi(self) -> float:
        return (2.0 - 2.0 ** (1 - self.mantissa)) * 2.0**self.shift

    @property
    def lo(self) -> float:
        return -self.hi

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int16

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        sign, flag, size = encode_windows(x, self.mantissa, self.shift, promote=self.corner == "promote")
        return (size | (flag.int() << self.mantissa) | (sign.int() << (self.mantissa + 1))).to(self.code_dtype)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return _values(self.mantissa, self.shift, 2).to(codes.device)[codes.long()]


@lru_cache(maxsize=64)
def _values(mantissa: int, shift: int, windows: int) -> Tensor:
    """The value of every code, windows · 2^m positive ones and then the negative ones.  float32, exact"""
    size = torch.arange(1 << mantissa).float() * 2.0 ** (1 - mantissa)
    positive = torch.cat([size * 2.0 ** (shift * flag) for flag in range(windows)])
    return torch.cat([positive, -positive])


@dataclass(frozen=True)
class SharedExponent(NumberFormat):
    """2^(code - bias), code 0 … 2^bits - 1: the exponent that a block shares, in the width that hardware gives it.

    bits: of the exponent, 2 to 7; eight are qcore's own `e8m0`
    bias: the exponent of code 0 is -bias; None = 2^(bits - 1) - 1, that of IEEE: five bits are 2^-15 … 2^16

    Where the largest magnitude of a block has the exponent e_max, the shared one is e_max - floor(log2 of the element's largest number): the element
    format's own window, no more.  It is clamped: blocks above saturate, values far below the lowest become zero.  For tensors that lie elsewhere
    (gradients) give it a granularity 'tensor' and a scale of its own, an exponent bias for the tensor: see `gse`.
    """

    name: ClassVar[str] = "shared-exponent"
    bits: int = 5
    bias: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 7:
            raise SpecError(f"a shared exponent has 2 to 7 bits, got bits={self.bits}; for eight take format 'e8m0'")
        if self.lowest < -127 or self.highest > 127:
            raise SpecError(
                f"{self} reaches 2^{self.lowest} … 2^{self.highest}, which float32 cannot hold; take a bias of {(1 << self.bits) - 128} to 127"
            )

    @property
    def lowest(self) -> int:
        return -((1 << (self.bits - 1)) - 1 if self.bias is None else self.bias)

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    @property
    def lo(self) -> float:
        return 2.0**self.lowest

    @property
    def hi(self) -> float:
        return 2.0**self.highest

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        exponent = PowerOfTwo().encode(x.float().clamp(self.lo, self.hi)).int() - 127
        return (exponent - self.lowest).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return torch.ldexp(torch.ones_like(codes, dtype=torch.float64), codes.int() + self.lowest).float()

    def choose_scale(self, amax: Tensor, element: NumberFormat) -> Tensor:
        """2^(floor(log2 amax) - floor(log2 element.hi)), not yet clamped to what the codes reach: a scale above this one may still move it."""
        return PowerOfTwo("floor").choose_scale(amax, element)


# presets ------------------------------------------------------------------------------------------------------------------------------------


def _block(element: NumberFormat, group: int, exponent_bits: int, when: Literal["static", "dynamic"]) -> QuantSpec:
    shared = QuantSpec(format=SharedExponent(exponent_bits), granularity=Unscaled())
    return QuantSpec(format=element, granularity=PerGroup(group), scale=shared, when=when)


def bfp(mantissa: int, *, group: int = 32, exponent_bits: int = 5, when: Literal["static", "dynamic"] = "static") -> QuantSpec:
    """BFP(m): `group` signed magnitudes of m bits under one exponent."""
    return _block(BFP(mantissa), group, exponent_bits, when)


def bbfp(mantissa: int, overlap: int, *, group: int = 32, exponent_bits: int = 5, when: Literal["static", "dynamic"] = "static") -> QuantSpec:
    """BBFP(m, o): m + 2 + exponent_bits / group bits a value."""
    return _block(BBFP(mantissa, overlap), group, exponent_bits, when)


def gse(
    bits: int,
    *,
    group: int = 32,
    bias: Literal["ieee", "tensor"] = "ieee",
    rounding: Literal["nearest", "truncate"] = "nearest",
    when: Literal["static", "dynamic"] = "static",
) -> QuantSpec:
    """GSE-INTb: group-shared-exponent integers of b bits with the sign, bits + 5/32 a value.

    bias: "ieee": exponents are -15 … 16.  "tensor": a power of two for the tensor puts its largest block at the top code, for gradients far below
          2^-15

    Source: GSQ-Tuning, https://arxiv.org/abs/2502.12913, section 3
    """
    if bias not in ("ieee", "tensor"):
        raise SpecError(f"unknown exponent bias {bias!r} of GSE; have: ieee, tensor")
    above = QuantSpec(format=PowerOfTwo(), granularity=Unscaled())
    shared = (
        QuantSpec(format=SharedExponent(5), granularity=Unscaled())
        if bias == "ieee"
        else QuantSpec(format=SharedExponent(5), granularity=PerTensor(), scale=above)
    )
    return QuantSpec(format=BFP(bits - 1, rounding), granularity=PerGroup(group), scale=shared, when=when)
