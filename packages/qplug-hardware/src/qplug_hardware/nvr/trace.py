"""A trace: which rows a sparse program gathers, through which indices, in which loops.

A program visits loops (rows of a sparse matrix, queries, experts).  For each element of a loop it loads an index from a stream that lies in order in
memory, follows it through zero or more tables, and gathers one row of data:

    row = tables[-1][… tables[0][indices[k]]]

A CSR product A·B has one loop for each row of A, `indices` = its column numbers, no table, and the rows of B as data.
Reads of row pointers and writes of results are not part of a trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qcore.errors import SpecError

from qplug_hardware.nvr.config import require, whole

Ints = NDArray[np.int64]

_PAGE = 4096
# pages between two arrays: what a sub-thread without loop bounds reads past an end is no one's data
_GUARD = 64


@dataclass(frozen=True, eq=False)
class Trace:
    """Checked when it is made; SpecError names the place of a number that is out of range.

    indices:     [n] as they lie in memory
    rows:        rows of data;  row_bytes: of each, one after the other
    tables:      each [m], whose numbers point into the next table or, of the last one, at a row
    bounds:      [loops, 2] first and past-the-end position in `indices`, in the order in which the program visits them.  Loops may lie in another
                 order than they are visited, leave gaps, or overlap.  None: one loop over everything
    index_bytes: of an index, and of a table's entry
    value_bytes: of a number that is streamed beside each index (the weights of A); 0 = none
    """

    name: str
    indices: Ints
    rows: int
    row_bytes: int
    tables: tuple[Ints, ...] = ()
    bounds: Ints | None = None
    index_bytes: int = 4
    value_bytes: int = 0

    def __post_init__(self) -> None:
        whole("rows", self.rows, 1)
        whole("row_bytes", self.row_bytes, 1, 1 << 20)
        require("index_bytes", self.index_bytes, "1, 2, 4 or 8", self.index_bytes in (1, 2, 4, 8))
        whole("value_bytes", self.value_bytes, 0, 64)
        object.__setattr__(self, "indices", _ints("indices", self.indices, 1))
        object.__setattr__(self, "tables", tuple(_ints(f"tables[{i}]", t, 1) for i, t in enumerate(self.tables)))
        if not len(self.indices):
            raise SpecError(f"trace {self.name!r} has no indices; a trace needs one gather at least")
        arrays = [("indices", self.indices), *((f"tables[{i}]", t) for i, t in enumerate(self.tables))]
        targets = [*((f"table {i}", len(t)) for i, t in enumerate(self.tables)), ("data", self.rows)]
        for (name, array), (target, size) in zip(arrays, targets, strict=True):
            wrong = np.flatnonzero((array < 0) | (array >= size))
            if len(wrong):
                k = int(wrong[0])
                raise SpecError(f"{name}[{k}] is {int(array[k])}; allowed: 0 to {size - 1}, the rows of {target}")
        n = len(self.indices)
        bounds = np.array([[0, n]], np.int64) if self.bounds is None else _ints("bounds", self.bounds, 2)
        if bounds.shape[1] != 2:
            raise SpecError(f"bounds have shape {bounds.shape}; allowed: [loops, 2], first and past-the-end position of each loop")
        wrong = np.flatnonzero((bounds[:, 0] < 0) | (bounds[:, 1] < bounds[:, 0]) | (bounds[:, 1] > n))
        if len(wrong):
            r = int(wrong[0])
            raise SpecError(f"loop {r} goes from {bounds[r, 0]} to {bounds[r, 1]}; allowed: 0 ≤ first ≤ end ≤ {n}, the number of indices")
        bounds = bounds[bounds[:, 1] > bounds[:, 0]]
        if not len(bounds):
            raise SpecError(f"trace {self.name!r} visits no element; a trace needs one gather at least")
        object.__setattr__(self, "bounds", bounds)

    @property
    def gathers(self) -> int:
        """Rows that the program gathers, over all loops."""
        return int((self.loops[:, 1] - self.loops[:, 0]).sum())

    @property
    def loops(self) -> Ints:
        """[loops, 2]: the bounds, without empty loops."""
        assert self.bounds is not None
        return self.bounds

    @property
    def visited(self) -> Ints:
        """[gathers]: positions in `indices`, in the order of the program."""
        return np.concatenate([np.arange(a, b) for a, b in self.loops])

    def follow(self, indices: Ints) -> Ints:
        """The rows that these indices lead to."""
        for table in self.tables:
            indices = table[indices]
        return indices

    @property
    def targets(self) -> Ints:
        """[gathers]: the rows that the program gathers, in its order."""
        return self.follow(self.indices[self.visited])

    def head(self, gathers: int) -> "Trace":
        """The same trace, ended after so many gathers."""
        whole("limit", gathers, 1)
        before = np.concatenate([[0], np.cumsum(self.loops[:, 1] - self.loops[:, 0])])
        left = np.clip(gathers - before[:-1], 0, None)
        ends = np.minimum(self.loops[:, 1], self.loops[:, 0] + left)
        bounds = np.stack([self.loops[:, 0], ends], 1)
        return Trace(self.name, self.indices, self.rows, self.row_bytes, self.tables, bounds, self.index_bytes, self.value_bytes)

    def summary(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "gathers": self.gathers,
            "loops": len(self.loops),
            "rows": self.rows,
            "row_bytes": self.row_bytes,
            "levels": 1 + len(self.tables),
            "distinct_rows": len(np.unique(self.targets)),
        }


def _ints(name: str, array: Any, dims: int) -> Ints:
    made = np.asarray(array)
    if made.ndim != dims or made.dtype.kind not in "iu":
        raise SpecError(f"{name} is an array of {made.dtype} with shape {made.shape}; allowed: integers with {dims} dimension{'s' * (dims > 1)}")
    if made.dtype == np.uint64 and made.size and made.max() > np.iinfo(np.int64).max:
        raise SpecError(f"{name} holds {made.max()}; allowed: what fits 63 bits")
    return made.astype(np.int64)


@dataclass(frozen=True)
class Layout:
    """Byte addresses of a trace's arrays: each begins on a page, with unused pages between."""

    index: int
    value: int
    tables: tuple[int, ...]
    data: int

    @classmethod
    def of(cls, trace: Trace) -> "Layout":
        at = _PAGE * _GUARD
        bases = []
        n = len(trace.indices)
        sizes = [n * trace.index_bytes, n * trace.value_bytes, *(len(t) * trace.index_bytes for t in trace.tables), trace.rows * trace.row_bytes]
        for size in sizes:
            bases.append(at)
            at += (-(-size // _PAGE) + _GUARD) * _PAGE
        return cls(bases[0], bases[1], tuple(bases[2:-1]), bases[-1])


def spans(bounds: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    """Vectors: (first, end) in the order of the program; none reaches over the end of a loop.

    Loops of 20 and 5 elements with width 16: (0, 16), (16, 20), (20, 25).
    """
    out, at = [], 0
    for first, end in bounds:
        size = end - first
        out += [(at + k, at + min(k + width, size)) for k in range(0, size, width)]
        at += size
    return out
