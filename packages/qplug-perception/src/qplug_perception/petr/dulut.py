"""DULUT: a function of one variable by two small tables, each linear between evenly spaced entries, y = T2(T1(x)).

T1 says where in T2 to look.  Where it rises by k over one of its cells, the function has k straight pieces there; where it rises by 1 over m
cells, one piece spans all m.  So pieces are short where the function bends, although both tables are uniform, as hardware has them.

Tables are found by splitting and merging: the worst piece is split, and paid for by merging the two neighbouring pieces that are missed least, as
long as the largest error falls.  Corners of pieces lie on cell boundaries or divide a cell evenly, so the cascade is those pieces exactly.
Fitting free corners first and sampling them onto T1's grid gave errors 20 to 160 times as large.

The split and merge is the paper's idea; its details, how a merged piece is taken apart among them, are inferred.

Source: FQ-PETR, https://arxiv.org/abs/2502.15488, section on DULUT.  The repository that the paper names holds no code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, log2
from typing import Literal

import torch
import torch.nn.functional as F
from qcore.errors import SpecError
from torch import Tensor

Tail = Literal["zero", "identity", "clamp"]
_SAMPLES = 64  # of a piece, to measure its error


@dataclass(frozen=True)
class Function:
    """What a table stands for, and what it is beyond its range: 0, x itself, or its value at the end."""

    name: str
    of: Callable[[Tensor], Tensor]
    low: Tail
    high: Tail


FUNCTIONS = {
    f.name: f
    for f in (
        Function("silu", F.silu, "zero", "identity"),
        Function("gelu", F.gelu, "zero", "identity"),
        Function("gelu-tanh", lambda x: F.gelu(x, approximate="tanh"), "zero", "identity"),
        Function("exp", torch.exp, "clamp", "clamp"),
        Function("sigmoid", torch.sigmoid, "clamp", "clamp"),
    )
}


@dataclass(frozen=True)
class Tables:
    """T1 and T2.

    function: its name
    low, high: the range of T1
    first:    [n1] float64, not falling, from 0 to at most n2 - 1: places in T2
    second:   [n2] float64, values
    error:    the largest error between the corners, as it was measured when the tables were built
    """

    function: str
    low: float
    high: float
    first: Tensor
    second: Tensor
    error: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise SpecError(f"a table's range rises, got {self.low} … {self.high}")
        if bool((self.first.diff() < 0).any()) or float(self.first[0]) < 0 or float(self.first[-1]) > len(self.second) - 1:
            raise SpecError(
                f"the first table of {self.function} does not rise from 0 to {len(self.second) - 1}; a cascade is exact only where it does"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """y = T2(T1(x)) in the dtype of x; beyond the range the function's tails."""
        return cascade(x, self.first.to(x), self.second.to(x), self.low, self.high, tails(self.function))


def tails(function: str) -> tuple[Tail, Tail]:
    """What the function is below and above every range."""
    return FUNCTIONS[function].low, FUNCTIONS[function].high


def cascade(x: Tensor, first: Tensor, second: Tensor, low: float, high: float, ends: tuple[Tail, Tail]) -> Tensor:
    """Both look-ups in floats."""
    return beyond(x, _linear(second, _linear(first, (x - low) * ((len(first) - 1) / (high - low)))), low, high, ends)


def fixed_cascade(x: Tensor, first: Tensor, second: Tensor, fraction: int, low: float, high: float, ends: tuple[Tail, Tail]) -> Tensor:
    """The same with T1 in fixed point: entries, the place in a cell and what comes out have `fraction` bits behind the point.

    first: [n1] int32, places · 2^fraction
    """
    one = 1 << fraction
    cells = len(first) - 1
    # a place is a whole number of 2^-fraction cells; NaN stays NaN by way of `beyond`
    place = ((x.double() - low) * (cells / (high - low))).clamp(0, cells).nan_to_num(0.0)
    place = (place * one).round().long()
    i = (place >> fraction).clamp(max=cells - 1)
    wide = first.long()
    at = wide[i] + (((wide[i + 1] - wide[i]) * (place - (i << fraction)) + one // 2) >> fraction)
    j = (at >> fraction).clamp(max=len(second) - 2)
    share = (at - (j << fraction)).double() / one
    values = second.double()
    y = values[j] + (values[j + 1] - values[j]) * share
    return beyond(x, y.to(x.dtype), low, high, ends)


def beyond(x: Tensor, y: Tensor, low: float, high: float, ends: tuple[Tail, Tail]) -> Tensor:
    """`y` inside the range; outside it 0, x, or `y`, which was looked up at the range's end.  NaN stays."""
    for outside, tail in ((x < low, ends[0]), (x > high, ends[1])):
        if tail != "clamp":
            y = torch.where(outside, x if tail == "identity" else torch.zeros_like(x), y)
    return torch.where(x.isnan(), x, y)


def fraction_bits(entries: int) -> int:
    """log2(n2) + 8, rounded up: with fewer the place in T2 is coarser than an 8-bit result."""
    return ceil(log2(entries)) + 8


def _linear(table: Tensor, at: Tensor) -> Tensor:
    """Between entries; clamped to the ends."""
    at = at.clamp(0, len(table) - 1).nan_to_num(0.0)
    i = at.floor().clamp(max=len(table) - 2).long()
    return table[i] + (table[i + 1] - table[i]) * (at - i)


# building --------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Cells start … start + cells - 1 of T1 with so many straight pieces; one of the two numbers is 1."""

    start: int
    cells: int
    straight: int


class _Builder:
    def __init__(self, function: Function, low: float, high: float, cells: int) -> None:
        self.of, self.low, self.step = function.of, low, (high - low) / cells
        self._errors: dict[_Piece, float] = {}

    def corners(self, piece: _Piece) -> Tensor:
        start = self.low + piece.start * self.step
        return start + torch.linspace(0, piece.cells * self.step, piece.straight + 1, dtype=torch.float64)

    def error(self, piece: _Piece) -> float:
        """max |f - straight pieces| between the corners, which lie on f."""
        if piece not in self._errors:
            x = self.corners(piece)
            y = self.of(x)
            share = torch.linspace(0, 1, _SAMPLES + 1, dtype=torch.float64)[:, None]
            straight = y[:-1] + (y[1:] - y[:-1]) * share
            self._errors[piece] = float((self.of(x[:-1] + (x[1:] - x[:-1]) * share) - straight).abs().max())
        return self._errors[piece]

    def split(self, piece: _Piece) -> list[_Piece]:
        """One straight piece more; a merged one is taken apart where its larger half errs least."""
        if piece.cells == 1:
            return [_Piece(piece.start, 1, piece.straight + 1)]
        halves = [[_Piece(piece.start, cells, 1), _Piece(piece.start + cells, piece.cells - cells, 1)] for cells in range(1, piece.cells)]
        return min(halves, key=lambda pair: max(map(self.error, pair)))

    def cheapest(self, pieces: list[_Piece], spared: list[_Piece]) -> int | None:
        """Where two neighbours, single pieces both, are merged with the least error; pieces in `spared` are not touched.  None: nowhere"""
        places = [i for i, (a, b) in enumerate(pairwise(pieces)) if a.straight == b.straight == 1 and a not in spared and b not in spared]
        return min(places, key=lambda i: self.error(_merged(pieces[i], pieces[i + 1])), default=None)


def _merged(a: _Piece, b: _Piece) -> _Piece:
    return _Piece(a.start, a.cells + b.cells, 1)


@lru_cache(maxsize=64)
def build(function: str, low: float, high: float, first: int = 32, second: int = 32) -> Tables:
    """The tables of a function over a range.

    first, second: entries of T1 and T2, at least 3 and 2

    Worked: exp over [-20, 0] with 32 + 32 entries errs by 8e-4 where one table of 32 errs by 4e-2.
    """
    if function not in FUNCTIONS:
        raise SpecError(f"no table is known for {function!r}; have: {', '.join(FUNCTIONS)}")
    if first < 3 or second < 2 or not low < high:
        raise SpecError(f"tables have at least 3 and 2 entries over a rising range, got {first} and {second} over {low} … {high}")
    b = _Builder(FUNCTIONS[function], low, high, first - 1)
    pieces = [_Piece(i, 1, 1) for i in range(first - 1)]
    spare = (second - 1) - (first - 1)
    while spare < 0:
        i = b.cheapest(pieces, [])
        assert i is not None, pieces
        pieces[i : i + 2] = [_merged(pieces[i], pieces[i + 1])]
        spare += 1
    while True:
        worst = max(range(len(pieces)), key=lambda i: b.error(pieces[i]))
        largest, parts = b.error(pieces[worst]), b.split(pieces[worst])
        after = [*pieces[:worst], *parts, *pieces[worst + 1 :]]
        changed = max(map(b.error, parts))
        if not spare:
            i = b.cheapest(after, parts)
            if i is None:
                break
            merged = _merged(after[i], after[i + 1])
            changed = max(changed, b.error(merged))
            after[i : i + 2] = [merged]
        if changed >= largest:
            break
        pieces, spare = after, max(spare - 1, 0)
    return _tables(function, low, high, b, pieces, first, second)


def _tables(function: str, low: float, high: float, b: _Builder, pieces: list[_Piece], first: int, second: int) -> Tables:
    """T1 rises by `straight` over a piece's `cells`; T2 holds f at the corners."""
    places, corners = [0.0], [b.corners(pieces[0])[:1]]
    for piece in pieces:
        base = places[-1]
        places += [base + piece.straight * (c + 1) / piece.cells for c in range(piece.cells)]
        places[-1] = round(places[-1])  # a piece ends on an entry of T2
        corners.append(b.corners(piece)[1:])
    x = torch.cat(corners)
    y = b.of(x)
    y = torch.cat([y, y[-1:].expand(second - len(y))])  # entries that no piece needed
    error = max(map(b.error, pieces))
    return Tables(function, low, high, torch.tensor(places, dtype=torch.float64), y, error)


def uniform(function: str, low: float, high: float, entries: int) -> Tensor:
    """What two tables are compared with: one, evenly spaced, linear between its entries.  [entries] float64"""
    return FUNCTIONS[function].of(torch.linspace(low, high, entries, dtype=torch.float64))
