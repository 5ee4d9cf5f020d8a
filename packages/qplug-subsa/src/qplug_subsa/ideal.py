"""IDEAL: the texts whose influence spreads furthest over the graph of nearest neighbours."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from qcore.errors import SpecError

from qplug_subsa.neighbours import nearest
from qplug_subsa.objective import Selection, lazy_greedy
from qplug_subsa.rows import Array, as_rows, require_budget
from qplug_subsa.units import Units


@dataclass
class Influence:
    """Expected number of texts that an independent cascade from S reaches, over fixed draws of which edges are live.

    With the draws fixed, reach is a coverage function: monotone and submodular, so greedy may be lazy.
    live: for each draw, the successors of every text as (offsets [n + 1], targets)
    """

    count: int
    live: list[tuple[Array, Array]]
    reached: Array = field(init=False)

    def __post_init__(self) -> None:
        self.reached = np.zeros((len(self.live), self.count), bool)

    @property
    def n(self) -> int:
        return self.count

    @property
    def scale(self) -> float:
        return float(self.count)

    def gains(self, indices: Array) -> Array:
        return np.array([sum(len(self._spread(i, draw)) for draw in range(len(self.live))) / len(self.live) for i in indices])

    def add(self, index: int) -> None:
        for draw in range(len(self.live)):
            self.reached[draw, self._spread(index, draw)] = True

    def _spread(self, index: int, draw: int) -> list[int]:
        """What `index` reaches and nothing chosen did."""
        offsets, targets = self.live[draw]
        reached = self.reached[draw]
        if reached[index]:
            return []
        seen = {int(index)}
        stack = [int(index)]
        while stack:
            v = stack.pop()
            for w in targets[offsets[v] : offsets[v + 1]].tolist():
                if w not in seen and not reached[w]:
                    seen.add(w)
                    stack.append(w)
        return list(seen)


@dataclass(frozen=True)
class IDEAL:
    """Greedy influence maximization: each text points to its k nearest, an edge is live with probability cosine / sum of the k cosines.

    k:     neighbours
    draws: simulations of the independent cascade, drawn once.  The released code draws anew for every candidate, so it partly chooses lucky draws;
           it also counts a text twice that two neighbours reach at once, and starts from an arbitrary text
    seed:  of the draws

    Source: https://arxiv.org/abs/2310.10873, algorithm 1.
    """

    name: ClassVar[str] = "ideal"
    k: int = 10
    draws: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 1 or self.draws < 1:
            raise SpecError(f"ideal wants k and draws of 1 or more, got {self.k} and {self.draws}")

    def select(self, embeddings: Any, k: int, scores: Any = None) -> list[int]:
        """Indices in order of choice.  embeddings: [n, d];  k: how many;  scores are not looked at"""
        return list(self.run(embeddings, k).indices)

    def run(self, embeddings: Any, k: int) -> Selection:
        rows = as_rows(embeddings)
        n = rows.shape[0]
        require_budget(k, n)
        return lazy_greedy(self.influence(Units.of(rows, centre=False)), k)

    def influence(self, units: Units) -> Influence:
        """The graph with its draws."""
        n = units.rows.shape[0]
        neighbours, cosines = nearest(units, self.k)
        share = np.clip(cosines, 0, None)
        share = share / np.maximum(share.sum(1, keepdims=True), np.finfo(np.float64).tiny)
        rng = np.random.default_rng(self.seed)
        live = []
        for _ in range(self.draws):
            on = rng.random(share.shape) < share
            live.append((np.concatenate([[0], np.cumsum(on.sum(1))]), neighbours[on]))
        return Influence(n, live)
