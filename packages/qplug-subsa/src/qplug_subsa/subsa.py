"""Sub-SA in memory that grows with n + d, never with n².

The kernel is ½ + ½ ê_i·ê_j, so both sums of a gain are dot products with sums of unit vectors:

    Σ_{u∈U} K_ue = n/2 + ½ ê_e·c      with c = Σ_u ê_u
    Σ_{s∈S} K_se = |S|/2 + ½ ê_e·p    with p = Σ_{s∈S} ê_s
    gain(e | S) = λn/2 - |S| + ½ ê_e·(λc - 2p)

The next choice is the row with the largest dot product with one vector.  Gains never grow, so old ones bound new ones from above: mostly a few
rows are looked at again.  Where too many could still win (a small λ), one float32 pass over the rows gives bounds within its proven rounding error,
and the few that are left are computed in float64.  So every choice is the one of the dense algorithm, and no bit hangs on how a pass was made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from qcore.errors import SpecError

from qplug_subsa.group import ALONE, Group
from qplug_subsa.objective import TIE, Selection
from qplug_subsa.rows import Array, as_rows, require_budget
from qplug_subsa.units import Units

_FIRST = 64  # rows looked at before anything else, at every choice
_CHUNK = 4096  # rows of one gather
_NOWHERE = 2**62


@dataclass(frozen=True)
class SubSA:
    """Greedy selection by representativeness less redundancy (Sub-SA); linear in the size of the pool.

    lam:    λ, the weight of representing the pool against repeating oneself.  1 is the paper's.  The reward grows with the pool and the penalty only
            with the budget, so on skewed pools λ = 1 chooses densely packed texts: look at the coverage.  "auto" = 2 k / n, where both weigh the same
    centre: subtract the mean embedding first, as the released code does; it changes what is chosen

    Source: https://arxiv.org/abs/2407.05693.
    """

    name: ClassVar[str] = "subsa"
    lam: float | Literal["auto"] = 1.0
    centre: bool = True

    def __post_init__(self) -> None:
        if self.lam != "auto" and not (isinstance(self.lam, (int, float)) and 0 <= self.lam < np.inf):
            raise SpecError(f'lam is "auto" or a finite number of 0 or more, got {self.lam!r}')

    def select(self, embeddings: Any, k: int, scores: Any = None) -> list[int]:
        """Indices in order of choice.  embeddings: [n, d];  scores are not looked at"""
        return list(self.run(embeddings, k).indices)

    def run(self, embeddings: Any, k: int, group: Group = ALONE, progress: Callable[[int, int], None] = lambda done, total: None) -> Selection:
        """The selection, with its gains; indices count over all processes of the group.

        embeddings: [n, d] tensor, array, path of a .npy file, or this process's share of the rows
        progress:   called with (chosen so far, k)
        """
        rows = as_rows(embeddings)
        n = int(group.sum(np.array([rows.shape[0]], np.float64))[0])
        require_budget(k, n)
        lam = 2 * k / n if self.lam == "auto" else float(self.lam)
        units = Units.of(rows, centre=self.centre, group=group)
        search = _Search(units, lam, group)
        indices, gains = [], []
        for done in range(k):
            index, gain = search.next()
            indices.append(index)
            gains.append(gain)
            progress(done + 1, k)
        return Selection(tuple(indices), tuple(gains), search.evaluated, lam, tuple(self._notes(units, gains, group)))

    @staticmethod
    def _notes(units: Units, gains: list[float], group: Group) -> list[str]:
        notes = []
        if lost := int(group.sum(np.array([units.without_direction], np.float64))[0]):
            notes.append(f"{lost} embeddings equal the mean and have no direction; their similarity to all others counts as ½")
        if (first := next((i for i, g in enumerate(gains) if g < 0), None)) is not None:
            notes.append(f"from choice {first + 1} on gains are negative: adding more lowers the objective; lam=2 has no negative gain")
        return notes


class _Search:
    """The rows of one process, with upper bounds of their gains."""

    def __init__(self, units: Units, lam: float, group: Group) -> None:
        self.units, self.lam, self.group = units, lam, group
        self.query = lam * units.total  # λc - 2p
        self.base = lam * units.count / 2  # λn/2 - |S|
        self.tie = TIE * (lam * units.count + 2)
        self.bound = self.base + 0.5 * units.dot(self.query)
        self.stamp = np.zeros(len(self.bound), np.int32)  # the choice for which a bound is exact
        self.step = 0
        self.evaluated = len(self.bound)
        self.limit = max(_FIRST, len(self.bound) // 64)  # more than these: a pass over all rows is quicker

    def next(self) -> tuple[int, float]:
        """The global index that is chosen, and its gain."""
        group, bound = self.group, self.bound
        best = group.max(self._local_best())
        near = np.flatnonzero((bound >= best - self.tie) & (self.stamp == self.step))
        mine = group.offset + int(near[0]) if len(near) else _NOWHERE
        chosen = group.min(mine)
        here = chosen == mine
        message = np.zeros(len(self.query) + 1)
        if here:
            local = chosen - group.offset
            message[:-1] = self.units.take(np.array([local]))[0]
            message[-1] = bound[local]
            bound[local] = -np.inf
        message = group.sum(message)
        self.query = self.query - 2 * message[:-1]
        self.base -= 1
        self.step += 1
        return chosen, float(message[-1])

    def _local_best(self) -> float:
        """The largest gain of this process; every row that could be within a tie of it is exact afterwards."""
        if not len(self.bound):
            return -np.inf
        if self.step == 0:
            return float(self.bound.max())
        best = self._look(self._top(_FIRST))
        waiting = self._waiting(best)
        if len(waiting) > self.limit:
            tight = self.base + 0.5 * self.units.dot_above(self.query)
            np.fmin(self.bound, tight, out=self.bound, where=self.stamp != self.step)
            best = max(best, self._look(self._top(_FIRST)))
            waiting = self._waiting(best)
        return max(best, self._look(waiting))

    def _top(self, count: int) -> Array:
        """The rows with the largest bounds that are not exact yet."""
        bound = np.where(self.stamp == self.step, -np.inf, self.bound)
        top = np.argpartition(-bound, count)[:count] if count < len(bound) else np.arange(len(bound))
        return top[bound[top] > -np.inf]

    def _waiting(self, best: float) -> Array:
        # a process whose rows are all chosen has best = -inf, as they have
        return np.flatnonzero((self.bound >= best - self.tie) & (self.bound > -np.inf) & (self.stamp != self.step))

    def _look(self, indices: Array) -> float:
        """Make the bounds of these rows exact; returns the largest of them."""
        for start in range(0, len(indices), _CHUNK):
            part = np.sort(indices[start : start + _CHUNK])
            self.bound[part] = self.base + 0.5 * (self.units.take(part) @ self.query)
        self.stamp[indices] = self.step
        self.evaluated += len(indices)
        return float(self.bound[indices].max()) if len(indices) else -np.inf
