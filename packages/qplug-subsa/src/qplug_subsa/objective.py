"""The objective of Sub-SA as it is written, and greedy maximization of any submodular objective.

F(S) = λ Σ_{u∈U} Σ_{s∈S} K_us - Σ_{s≠t∈S} K_st        (a graph-cut function; ordered pairs)
gain(e | S) = F(S ∪ {e}) - F(S) = λ Σ_{u∈U} K_ue - 2 Σ_{s∈S} K_se

The first sum rewards texts that stand for many, the second takes away what the chosen ones say twice.  K ≥ 0, so gains never grow while S does:
F is submodular.  It is monotone for λ ≥ 2; for λ = 1 as long as the chosen ones are at most half of any text's total similarity, as they are where
few are chosen out of many.  Then greedy reaches 1 - 1/e of the best (Nemhauser, Wolsey, Fisher 1978).

Source: Sub-SA, https://arxiv.org/abs/2407.05693; the gains are those of its released code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qplug_subsa.rows import Array, require_budget

# gains closer than this share of the largest possible one are equal, and the lowest index wins: so copies of a text are chosen in one order,
# whatever order a matrix product was summed in
TIE = 1e-11


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    indices:   in order of choice (the released code returns them sorted, which loses it)
    gains:     what each added to the objective when it was chosen
    evaluated: how many gains were computed one by one: n for each choice by plain greedy, far fewer by lazy greedy
    lam:       λ of graph cut, where the objective is one
    """

    indices: tuple[int, ...]
    gains: tuple[float, ...] = ()
    evaluated: int = 0
    lam: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """F of the chosen set."""
        return float(sum(self.gains))


class Objective(Protocol):
    """A monotone or non-monotone submodular function of sets of 0 … n - 1, together with the set chosen so far.

    scale: no gain is larger; gains nearer than TIE × scale are ties
    """

    @property
    def n(self) -> int: ...
    @property
    def scale(self) -> float: ...
    def gains(self, indices: Array) -> Array:
        """[len(indices)] gain of each, given what `add` was told."""

    def add(self, index: int) -> None:
        """`index` is chosen."""


@dataclass
class GraphCut:
    """F over a whole kernel in memory.

    K:   [n, n] symmetric, 0 … 1
    lam: λ ≥ 0
    """

    K: Array
    lam: float = 1.0
    column: Array = field(init=False)
    penalty: Array = field(init=False)

    def __post_init__(self) -> None:
        self.column = self.K.sum(0)
        self.penalty = np.zeros(len(self.K))

    @property
    def n(self) -> int:
        return len(self.K)

    @property
    def scale(self) -> float:
        return self.lam * self.n + 2

    def value(self, chosen: Sequence[int]) -> float:
        """F, from its definition."""
        chosen = list(chosen)
        inner = self.K[np.ix_(chosen, chosen)]
        return float(self.lam * self.K[:, chosen].sum() - (inner.sum() - inner.trace()))

    def gains(self, indices: Array) -> Array:
        return self.lam * self.column[indices] - 2 * self.penalty[indices]

    def add(self, index: int) -> None:
        self.penalty += self.K[index]


def greedy(objective: Objective, k: int) -> Selection:
    """k times the largest gain; every gain is computed every time."""
    require_budget(k, objective.n)
    every = np.arange(objective.n)
    free = np.ones(objective.n, bool)
    indices, gains = [], []
    for _ in range(k):
        g = np.where(free, objective.gains(every), -np.inf)
        best = int((g >= g.max() - TIE * objective.scale).argmax())
        indices.append(best)
        gains.append(float(g[best]))
        free[best] = False
        objective.add(best)
    return Selection(tuple(indices), tuple(gains), evaluated=k * objective.n)


def lazy_greedy(objective: Objective, k: int, batch: int = 32) -> Selection:
    """What `greedy` chooses; a gain is computed again only while its old value, which bounds it from above, could still win.

    Valid because gains never grow.  Source: Minoux 1978; here `batch` of the best bounds are looked at together.
    """
    n = objective.n
    require_budget(k, n)
    bound = np.asarray(objective.gains(np.arange(n)), np.float64).copy()
    tie = TIE * objective.scale
    evaluated = n
    indices, gains = [], []
    fresh = np.ones(n, bool)
    for _ in range(k):
        while True:
            best = bound[fresh].max() if fresh.any() else -np.inf
            waiting = np.flatnonzero(~fresh & (bound >= best - tie) & (bound > -np.inf))
            if not len(waiting):
                break
            if len(waiting) > batch:
                waiting = waiting[np.argpartition(-bound[waiting], batch)[:batch]]
            bound[waiting] = objective.gains(waiting)
            fresh[waiting] = True
            evaluated += len(waiting)
        chosen = int((fresh & (bound >= best - tie)).argmax())
        indices.append(chosen)
        gains.append(float(bound[chosen]))
        objective.add(chosen)
        bound[chosen] = -np.inf
        fresh[:] = False
    return Selection(tuple(indices), tuple(gains), evaluated)
