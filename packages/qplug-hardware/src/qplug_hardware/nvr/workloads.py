"""Traces of what sparse programs do: matrices, experts, caches of keys and values, point clouds, graphs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qcore.errors import SpecError

from qplug_hardware.nvr.config import require, whole
from qplug_hardware.nvr.trace import Ints, Trace


def csr(row_ptr: Any, col_idx: Any, columns: int, row_bytes: int, *, order: Any = None, value_bytes: int = 0, name: str = "csr") -> Trace:
    """A·B for sparse A in CSR and dense B: for each row of A, the rows of B at its column numbers.

    columns: of A, the rows of B;  order: the rows of A that are visited, in this order; None = all, in order
    """
    bounds = _bounds("row_ptr", row_ptr, col_idx)
    if order is not None:
        chosen = np.asarray(order)
        whole_rows = chosen.ndim == 1 and chosen.dtype.kind in "iu" and (not len(chosen) or (chosen.min() >= 0 and chosen.max() < len(bounds)))
        require("order", order, f"a list of rows from 0 to {len(bounds) - 1}", whole_rows)
        bounds = bounds[chosen]
    return Trace(name, col_idx, columns, row_bytes, bounds=bounds, value_bytes=value_bytes)


def csc(col_ptr: Any, row_idx: Any, rows: int, row_bytes: int, *, value_bytes: int = 0, name: str = "csc") -> Trace:
    """A·B for sparse A in CSC: for each column of A, the rows of the result that it adds to, which are gathered; that they are written too is not
    part of the trace.  rows: of A"""
    return Trace(name, row_idx, rows, row_bytes, bounds=_bounds("col_ptr", col_ptr, row_idx), value_bytes=value_bytes)


def moe_routing(chosen: Any, experts: int, row_bytes: int, *, name: str = "moe") -> Trace:
    """Expert by expert, the rows of the tokens that chose it.

    chosen: [tokens, k] experts of each token, -1 = none;  row_bytes: of a token's hidden state
    """
    chosen = _table("chosen", chosen)
    wrong = (chosen < -1) | (chosen >= experts)
    if wrong.any():
        token, k = np.argwhere(wrong)[0]
        raise SpecError(f"chosen[{token}, {k}] is {chosen[token, k]}; allowed: 0 to {experts - 1}, the experts, or -1 for none")
    token = np.repeat(np.arange(len(chosen)), chosen.shape[1])
    expert = chosen.reshape(-1)
    token, expert = token[expert >= 0], expert[expert >= 0]
    by_expert = np.argsort(expert, kind="stable")
    row_ptr = np.concatenate([[0], np.cumsum(np.bincount(expert, minlength=experts))])
    return csr(row_ptr, token[by_expert], len(chosen), row_bytes, name=name)


def route(scores: NDArray[Any], k: int) -> Ints:
    """[tokens, k]: the experts with the k highest scores of each token, the highest first, out of a routing matrix [tokens, experts]."""
    require("routing matrix", scores.shape, "[tokens, experts]", scores.ndim == 2)
    whole("k", k, 1, scores.shape[1])
    return np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)


def kv_rows(selected: Any, tokens: int, row_bytes: int, *, name: str = "kv") -> Trace:
    """Query by query, the rows of the cache that sparse attention reads.

    selected: [queries, k] positions, -1 = none;  row_bytes: of a key and value
    """
    return _padded(name, _table("selected", selected), tokens, row_bytes)


def kv_pages(selected: Any, block_table: Any, pages: int, page_bytes: int, *, name: str = "kv-pages") -> Trace:
    """The same over a paged cache: position → block table → page, two levels.

    selected: [queries, k] logical pages, -1 = none;  block_table: [logical pages] physical ones;  pages: physical pages
    """
    return _padded(name, _table("selected", selected), pages, page_bytes, (np.asarray(block_table),))


def neighbours(found: Any, points: int, row_bytes: int, *, name: str = "neighbours") -> Trace:
    """Point by point, the features of its neighbours.  found: [points, k] points, -1 = none"""
    return _padded(name, _table("neighbours", found), points, row_bytes)


def point_cloud(points: int, k: int, seed: int) -> Ints:
    """[points, k] nearest neighbours, in random order of points, on the shell of a sphere with noise; -1 beyond a radius: maps have holes."""
    whole("points", points, 2)
    whole("k", k, 1, points - 1)
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(points, 3))
    xyz = xyz / np.linalg.norm(xyz, axis=1, keepdims=True) + 0.02 * rng.normal(size=(points, 3))
    radius = 2 * np.sqrt(k / points)
    out = np.empty((points, k), np.int64)
    for start in range(0, points, 512):
        gaps = ((xyz[start : start + 512, None] - xyz[None]) ** 2).sum(-1)
        gaps[np.arange(len(gaps)), start + np.arange(len(gaps))] = np.inf
        near = np.argsort(gaps, axis=1, kind="stable")[:, :k]
        out[start : start + len(gaps)] = np.where(np.take_along_axis(gaps, near, 1) < radius**2, near, -1)
    return out


def power_law_graph(nodes: int, edges: int, seed: int) -> tuple[Ints, Ints]:
    """(row_ptr, col_idx) of a random graph: nodes are neighbours in proportion to weights ∝ rank^-0.8, and have as many as their weight asks for."""
    whole("nodes", nodes, 2)
    whole("edges", edges, 1)
    rng = np.random.default_rng(seed)
    weight = rng.permutation(np.arange(1, nodes + 1, dtype=np.float64) ** -0.8)
    share = weight / weight.sum()
    source, target = rng.choice(nodes, edges, p=share), rng.choice(nodes, edges, p=share)
    order = np.argsort(source, kind="stable")
    return np.concatenate([[0], np.cumsum(np.bincount(source, minlength=nodes))]), target[order]


def _padded(name: str, table: Ints, rows: int, row_bytes: int, tables: Sequence[Any] = ()) -> Trace:
    """A table as it lies in memory, one loop for each row; what is there of a row is moved to its front, and the program stops behind it."""
    front = np.take_along_axis(table, np.argsort(table < 0, axis=1, kind="stable"), 1)
    start = np.arange(len(front)) * front.shape[1]
    bounds = np.stack([start, start + (front >= 0).sum(1)], 1)
    return Trace(name, np.maximum(front, 0).reshape(-1), rows, row_bytes, tuple(tables), bounds)


def _table(name: str, array: Any) -> Ints:
    made = np.asarray(array)
    if made.ndim != 2 or made.dtype.kind not in "iu" or not made.size:
        raise SpecError(f"{name} is an array of {made.dtype} with shape {made.shape}; allowed: integers with 2 dimensions, not empty")
    return made.astype(np.int64)


def _bounds(name: str, pointers: Any, indices: Any) -> Ints:
    made, n = np.asarray(pointers), len(np.asarray(indices))
    if made.ndim != 1 or made.dtype.kind not in "iu" or len(made) < 2:
        raise SpecError(f"{name} is an array of {made.dtype} with shape {made.shape}; allowed: integers with 1 dimension, one more than rows")
    made = made.astype(np.int64)
    if made[0] != 0 or made[-1] != n:
        raise SpecError(f"{name} goes from {made[0]} to {made[-1]}; allowed: from 0 to {n}, the number of indices")
    down = np.flatnonzero(np.diff(made) < 0)
    if len(down):
        r = int(down[0])
        raise SpecError(f"{name}[{r + 1}] is {made[r + 1]}, less than {made[r]} before it; allowed: numbers that never fall")
    return np.stack([made[:-1], made[1:]], 1)
