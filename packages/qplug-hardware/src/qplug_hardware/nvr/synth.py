"""Traces made by rule and seed: the same arguments give the same trace."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from qplug_hardware.nvr.config import require, whole
from qplug_hardware.nvr.trace import Ints, Trace


def streaming(rows: int, gathers: int, row_bytes: int = 128, seed: int = 0) -> Trace:
    """Rows in the order of memory, again from the start after the last: a dense operand.  The seed changes nothing."""
    return Trace("streaming", np.arange(_count(gathers)) % _count(rows), rows, row_bytes)


def uniform(rows: int, gathers: int, row_bytes: int = 128, seed: int = 0) -> Trace:
    """Every row equally likely."""
    return Trace("uniform", _rng(seed).integers(_count(rows), size=_count(gathers)), rows, row_bytes)


def permutation(rows: int, gathers: int, row_bytes: int = 128, seed: int = 0) -> Trace:
    """Every row once, in random order, then again in another one."""
    rng = _rng(seed)
    rounds = -(-_count(gathers) // _count(rows))
    return Trace("permutation", np.concatenate([rng.permutation(rows) for _ in range(rounds)])[:gathers], rows, row_bytes)


def zipf(rows: int, gathers: int, row_bytes: int = 128, seed: int = 0, exponent: float = 1.2) -> Trace:
    """The r-th most popular row has probability ∝ r^-exponent; popular rows are scattered over memory."""
    require("exponent", exponent, "a finite number above 0", isinstance(exponent, (int, float)) and math.isfinite(exponent) and exponent > 0)
    rng = _rng(seed)
    return Trace("zipf", rng.permutation(_count(rows))[_zipf(rng, rows, _count(gathers), exponent)], rows, row_bytes)


def two_level(rows: int, gathers: int, row_bytes: int = 128, seed: int = 0) -> Trace:
    """A random order of entries of a table that holds a permutation of the rows: index → index → data."""
    rng = _rng(seed)
    table = rng.permutation(_count(rows))
    return Trace("two-level", rng.integers(rows, size=_count(gathers)), rows, row_bytes, (table,))


def short_rows(rows: int, gathers: int, row_bytes: int = 128, seed: int = 0, longest: int = 12) -> Trace:
    """Loops of 1 to `longest` uniform gathers that are visited in random order, every second one of those in memory: sampled nodes of a graph."""
    whole("longest", longest, 1)
    rng = _rng(seed)
    lengths: list[int] = []
    while sum(lengths) < _count(gathers):
        lengths.append(int(rng.integers(1, longest + 1)))
    lengths = [length for one in lengths for length in (one, int(rng.integers(1, longest + 1)))]
    ends = np.cumsum(lengths)
    bounds = np.stack([ends - lengths, ends], 1)[::2]
    indices = rng.integers(_count(rows), size=int(ends[-1]))
    return Trace("short-rows", indices, rows, row_bytes, (), bounds[rng.permutation(len(bounds))]).head(gathers)


SYNTHETIC: Mapping[str, Callable[[int, int, int, int], Trace]] = {
    "streaming": streaming,
    "uniform": uniform,
    "permutation": permutation,
    "zipf": zipf,
    "two-level": two_level,
    "short-rows": short_rows,
}


def _zipf(rng: np.random.Generator, rows: int, size: int, exponent: float) -> Ints:
    weight = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    edges = np.cumsum(weight)
    return np.minimum(np.searchsorted(edges, rng.random(size) * edges[-1], side="right"), rows - 1)


def _count(n: int) -> int:
    whole("count", n, 1)
    return n


def _rng(seed: int) -> np.random.Generator:
    whole("seed", seed, 0)
    return np.random.default_rng(seed)
