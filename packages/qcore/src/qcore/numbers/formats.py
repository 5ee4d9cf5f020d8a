"""The numbers that a code can stand for, before any scale.

A format is a frozen dataclass: equal fields mean the same format, and its fields are all that a checkpoint stores about it.  What depends on
data (a codebook, a base, a threshold) is not a field but a fitted *part*: `fit` finds it, `encode` and `decode` receive it.

| class | values at scale 1 | codes |
|---|---|---|
| Int(b) | -2^(b-1) … 2^(b-1)-1; one bit is the sign: -1, +1 | int8, the integer itself |
| Int(b, signed=False) | 0 … 2^b-1 | uint8 |
| Float(e, m) | a minifloat with e exponent and m mantissa bits, subnormals included | uint8, the bit pattern |
| PowerOfTwo() | 2^-127 … 2^127 (OCP E8M0): the scale format of MX | uint8, the exponent + 127 |
| Codebook(b, dim) | 2^b fitted numbers, or vectors of `dim` numbers | uint8 or int16, the index |
| LowRankCodebook(b, rank, dim) | 2^b fitted numbers (or vectors) for each block, in 8 bits, perhaps over a shared basis | uint8, the index |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers.kmeans import kmeans

Params = Mapping[str, Tensor]
NO_PARAMS: Params = {}


class NumberFormat(Protocol):
    """The numbers a code can stand for, before any scale.  At most 2**bits different codes.

    name:  how recipes and checkpoints call it, lower case
    bits:  stored bits of one code
    lo:    the smallest number at scale 1
    hi:    the largest number at scale 1
    dim:   values that one code stands for: 1, or d for a vector codebook
    parts: names of the fitted parameters that are stored beside the codes
    per_block: whether each block of the granularity has fitted parameters of its own, or the tensor one set
    shared: of the parts of a format with `per_block`, those that the tensor has once all the same
    label: what tables and messages call it, "" = name and bits; for formats that these two do not tell apart

    A format with `hi == -lo` and a float grid needs nothing more; a *scale* format may also define `choose_scale` (see `PowerOfTwo`).
    """

    name: ClassVar[str]
    bits: Any  # int; a field, a class variable or a property, as suits the format
    lo: Any  # float, likewise
    hi: Any
    dim: int = 1
    parts: tuple[str, ...] = ()
    per_block: bool = False
    shared: tuple[str, ...] = ()
    label: Any = ""

    def fit(self, x: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """The data-dependent parts, for already scaled values; {} for a fixed grid.

        x:      [B, n] values, or [B, n, dim] for vectors; B = 1 unless `per_block`
        weight: importance of each value, of x's shape; None counts all alike
        return: each part with B as its first dimension, but for `shared` ones
        """
        return {}

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        """The nearest codes of already scaled `x`: [...] → [...], or [..., dim] → [...].

        A part's leading dimensions (all but those that `fit` made for one block) broadcast against those of `x`.
        """

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        """float32 values of `codes` at scale 1: [...] → [...], or [..., dim] for vectors."""


@dataclass(frozen=True)
class Int(NumberFormat):
    """Two's-complement integers of 1 to 8 bits: bits=4 is -8 … 7; unsigned: 0 … 15.

    One signed bit is the sign alone, -1 or +1: it has no zero.  Rounding is to nearest, ties to even, saturating.
    """

    name: ClassVar[str] = "int"
    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SpecError(f"integers have 1 to 8 bits, got bits={self.bits}")

    @property
    def lo(self) -> float:
        return -float(2 ** (self.bits - 1)) if self.signed else 0.0

    @property
    def hi(self) -> float:
        if self.signed and self.bits == 1:
            return 1.0
        return float(2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        if self.signed and self.bits == 1:
            return torch.where(x < 0, -1, 0).to(torch.int8)
        return x.round().clamp(self.lo, self.hi).to(torch.int8 if self.signed else torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        if self.signed and self.bits == 1:
            return codes.float() * 2 + 1
        return codes.float()


@dataclass(frozen=True)
class Float(NumberFormat):
    """A sign, `exponent` and `mantissa` bits; round to nearest even, saturating, subnormals kept.

    special: which patterns are no numbers.  "none": all are numbers (OCP FP4 E2M1, FP6 E2M3 and E3M2);
             "nan": the last pattern is NaN, there is no infinity (E4M3, largest 448);
             "ieee": the last exponent is infinity and NaN (E5M2, largest 57344).
    Source: OCP Microscaling Formats v1.0, section 5.3; OCP 8-bit Floating Point v1.0.
    """

    name: ClassVar[str] = "float"
    exponent: int
    mantissa: int
    special: Literal["none", "nan", "ieee"] = "none"

    def __post_init__(self) -> None:
        if self.exponent < 1 or self.mantissa < 0 or self.bits > 8:
            raise SpecError(
                f"a minifloat has at least 1 exponent bit and at most 8 bits in all, got exponent={self.exponent}, mantissa={self.mantissa}"
            )
        if self.special not in ("none", "nan", "ieee"):
            raise SpecError(f"unknown special patterns {self.special!r} of a minifloat; have: none, nan, ieee")
        if self._top < 1:
            raise SpecError(f"{self} has no number but zero: all other patterns are special; give it a mantissa bit, or special 'none'")

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def lo(self) -> float:
        return -self.hi

    @property
    def hi(self) -> float:
        return float(_float_table(self)[self._top])

    @property
    def _top(self) -> int:
        """The largest magnitude's pattern, without the sign."""
        patterns = 1 << (self.exponent + self.mantissa)
        return patterns - {"none": 1, "nan": 2, "ieee": (1 << self.mantissa) + 1}[self.special]

    @property
    def _lowest_exponent(self) -> int:
        return 2 - (1 << (self.exponent - 1))

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        magnitude = x.float().abs().contiguous()
        # patterns ascend with the magnitudes, so the nearest is found by the bounds between them; above the last bound all saturate
        pattern = torch.bucketize(magnitude, _float_bounds(self).to(x.device), out_int32=True)
        return (pattern | (torch.signbit(x).int() << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return _float_table(self).to(codes.device)[codes.long()]


@lru_cache(maxsize=32)
def _float_table(fmt: Float) -> Tensor:
    """The value of every pattern.  [2**bits] float32; NaN where the pattern is no number"""
    pattern = torch.arange(1 << (fmt.bits - 1))
    e, f = pattern >> fmt.mantissa, (pattern & ((1 << fmt.mantissa) - 1)).double()
    lowest = fmt._lowest_exponent - fmt.mantissa
    value = torch.where(e == 0, torch.ldexp(f, torch.tensor(lowest)), torch.ldexp(f + (1 << fmt.mantissa), e - 1 + lowest)).float()
    value[fmt._top + 1 :] = torch.nan
    return torch.cat([value, -value])


@lru_cache(maxsize=32)
def _float_bounds(fmt: Float) -> Tensor:
    """The largest magnitude that still rounds to each pattern but the last.  [_top] float32, ascending"""
    table = _float_table(fmt)[: fmt._top + 1]
    middle = (table[1:] + table[:-1]) / 2  # exact: one mantissa bit more
    # a tie goes to the even pattern
    return torch.where(torch.arange(fmt._top) % 2 == 0, middle, torch.nextafter(middle, torch.zeros(())))


@dataclass(frozen=True)
class PowerOfTwo(NumberFormat):
    """2^-127 … 2^127, the E8M0 scale of the OCP MX formats; no zero, no sign.

    rule: how the shared exponent of a block follows from its largest magnitude A, for elements with largest number E (OCP MX v1.0, section 6.3).
          "floor": floor(log2 A) - floor(log2 E), the standard's own; the largest element may saturate.
          "ceil":  ceil(log2(A / E)): never saturates (also called RCEIL).
          "even":  as floor, after A was rounded to the element's mantissa: 3.5 → 4 for FP4 (Quark's rule, and that of compressed-tensors for FP4 and
                   FP6; for FP8 compressed-tensors rounds to FP4's one mantissa bit).
    """

    name: ClassVar[str] = "e8m0"
    rule: Literal["floor", "ceil", "even"] = "floor"

    def __post_init__(self) -> None:
        if self.rule not in ("floor", "ceil", "even"):
            raise SpecError(f"unknown rule {self.rule!r} for a shared exponent; have: floor, ceil, even")

    bits = 8
    lo = 2.0**-127
    hi = 2.0**127

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        f, e = torch.frexp(x.float().clamp(self.lo, self.hi))
        # x = f · 2^e, f in [1/2, 1): 2^(e-1) up to the midpoint 3/4 · 2^e, then 2^e
        return (e - 1 + (f > 0.75).int() + 127).clamp(0, 254).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        return torch.ldexp(torch.ones_like(codes, dtype=torch.float64), codes.int() - 127).float()

    def choose_scale(self, amax: Tensor, element: NumberFormat) -> Tensor:
        """The power of two for blocks whose largest magnitude is `amax`, given the format of their elements."""
        top = max(element.hi, -element.lo) if element.hi < -element.lo - 1 else element.hi
        if self.rule == "ceil":
            f, e = torch.frexp(amax.double() / top)
            exponent = torch.where(f == 0.5, e - 1, e)
        else:
            mantissa = _mantissa_bits(element)
            f, e = torch.frexp(amax.double())
            if self.rule == "even":
                f = torch.floor(f * 2 ** (mantissa + 1) + 0.5) / 2 ** (mantissa + 1)
                e = torch.where(f >= 1, e + 1, e)
            exponent = e - 1 - (torch.frexp(torch.tensor(top, dtype=torch.float64))[1] - 1)
        return torch.ldexp(torch.ones_like(amax, dtype=torch.float64), exponent.clamp(-127, 127)).float()


def _mantissa_bits(element: NumberFormat) -> int:
    """Bits behind the leading one of the element's largest numbers: 1 for E2M1, 6 for 8-bit integers, 7 for unsigned ones."""
    return element.mantissa if isinstance(element, Float) else max(element.bits - (2 if element.lo < 0 else 1), 0)


@dataclass(frozen=True)
class Codebook(NumberFormat):
    """2**bits numbers (dim=1) or vectors (dim=d) fitted to the data by weighted k-means; lo and hi are -1 and 1: scale first, then fit.

    bits:      of one code; a vector code costs bits / dim per value
    per_block: one codebook for each block of the granularity (GPTVQ), or one for the tensor
    """

    name: ClassVar[str] = "codebook"
    bits: int
    dim: int = 1
    per_block: bool = False
    iterations: int = 25

    parts = ("codebook",)
    lo = -1.0
    hi = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 15 or self.dim < 1:
            raise SpecError(f"a codebook has 1 to 15 bits a code and dim >= 1, got bits={self.bits}, dim={self.dim}")

    def fit(self, x: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        points = x.float() if self.dim > 1 else x.float().unsqueeze(-1)  # [B, n, d]
        weights = None if weight is None else (weight.float() if self.dim > 1 else weight.float().unsqueeze(-1))
        book = kmeans(points, 1 << self.bits, weights, self.iterations)  # [B, k, d]
        return {"codebook": book if self.dim > 1 else book.squeeze(-1)}

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        book = self._book(params)
        if self.dim == 1 and book.ndim == 1:
            index = torch.bucketize(x.float().contiguous(), (book[1:] + book[:-1]) / 2, right=False)
        elif self.dim == 1:
            index = (x.float().unsqueeze(-1) - book).abs().argmin(-1)
        else:
            index = (x.float().unsqueeze(-2) - book).square().sum(-1).argmin(-1)
        return index.to(torch.uint8 if self.bits <= 8 else torch.int16)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        book = self._book(params)
        if book.ndim == (1 if self.dim == 1 else 2):
            return book[codes.long()]
        index = codes.long().unsqueeze(-1)
        if self.dim == 1:
            return book.expand(*codes.shape, book.shape[-1]).gather(-1, index).squeeze(-1)
        book = book.expand(*codes.shape, *book.shape[-2:])
        return book.gather(-2, index.unsqueeze(-1).expand(*codes.shape, 1, self.dim)).squeeze(-2)

    def _book(self, params: Params) -> Tensor:
        if "codebook" not in params:
            raise SpecError(f"{self} needs its fitted part 'codebook'; call `fit`, or `quantize`, which does")
        return params["codebook"].float()


@dataclass(frozen=True)
class LowRankCodebook(NumberFormat):
    """A codebook of 2**bits numbers (dim=1) or vectors (dim=d) for each block, stored in 8 bits.

    The books of all blocks are rows of one matrix with few components: sorted, stacked [blocks, k] and written as U·V, V [rank, k] is shared,
    U [blocks, rank] is held in int8, one scale a component.  rank = 0 leaves the basis out: the books themselves are int8 under one scale, so give
    blocks of different size a scale of their own (granularity `tile`).  A book costs 8 bits times rank (or k·dim).  Vectors have no order, and
    no basis.
    Source: GPTVQ, section 3.4 (codebook quantization and SVD), https://arxiv.org/abs/2402.15319
    """

    name: ClassVar[str] = "codebook-lowrank"
    bits: int
    rank: int = 0
    iterations: int = 100
    dim: int = 1

    per_block = True
    lo = -1.0
    hi = 1.0

    def __post_init__(self) -> None:
        if self.dim < 1 or (self.dim > 1 and self.rank):
            raise SpecError(f"codebooks of vectors have no shared basis, got dim={self.dim} and rank={self.rank}; take rank=0")
        if not 1 <= self.bits <= 8 or not 0 <= self.rank <= 1 << self.bits:
            raise SpecError(f"a low-rank codebook has 1 to 8 bits a code and a rank of 0 to 2^bits, got bits={self.bits}, rank={self.rank}")

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("book", "book_scale", "basis") if self.rank else ("book", "book_scale")

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.parts[1:]

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def fit(self, x: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        points, weights = x.float(), None if weight is None else weight.float()
        if self.dim == 1:
            points, weights = points.unsqueeze(-1), None if weights is None else weights.unsqueeze(-1)
        return self.compress(kmeans(points, 1 << self.bits, weights, self.iterations).flatten(-2))

    def compress(self, books: Tensor) -> dict[str, Tensor]:
        """The stored parts of books [..., k·dim]; the order of a book's numbers (not of its vectors) is lost, so codes are chosen anew."""
        rows = (books.sort(-1).values if self.dim == 1 else books).flatten(0, -2).double()
        parts = {}
        if self.rank:
            # the components of the k × k second moment are those of the stack, however tall it is
            _, vectors = torch.linalg.eigh(rows.T @ rows)
            basis = vectors.flip(1)[:, : self.rank].T
            rows = rows @ basis.T
            parts["basis"] = basis.float()
        scale = (rows.abs().amax(0) if self.rank else rows.abs().amax().reshape(1)) / 127
        scale = torch.where(scale > 0, scale, 1.0).float()
        book = (rows / scale).round().clamp(-127, 127).to(torch.int8)
        return {"book": book.unflatten(0, books.shape[:-1]), "book_scale": scale, **parts}

    def books(self, params: Params) -> Tensor:
        """The numbers of each book, vector by vector.  → [..., k·dim] float32"""
        if "book" not in params:
            raise SpecError(f"{self} needs its fitted parts {', '.join(self.parts)}; call `fit`, or `quantize`, which does")
        rows = params["book"].float() * params["book_scale"].float()
        return rows @ params["basis"].float() if self.rank else rows

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        books = self.books(params)
        if self.dim > 1:
            books = books.unflatten(-1, (-1, self.dim))
            return (x.float().unsqueeze(-2) - books).square().sum(-1).argmin(-1).to(torch.uint8)
        return (x.float().unsqueeze(-1) - books).abs().argmin(-1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        books = self.books(params)
        if self.dim > 1:
            own = books.unflatten(-1, (-1, self.dim)).expand(*codes.shape, -1, -1)
            return own.gather(-2, codes.long()[..., None, None].expand(*codes.shape, 1, self.dim)).squeeze(-2)
        return books.expand(*codes.shape, books.shape[-1]).gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)


FP8_E4M3 = Float(4, 3, "nan")
FP8_E5M2 = Float(5, 2, "ieee")
FP6_E2M3 = Float(2, 3)
FP6_E3M2 = Float(3, 2)
FP4_E2M1 = Float(2, 1)
