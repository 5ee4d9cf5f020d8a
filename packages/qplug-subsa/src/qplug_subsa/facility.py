"""Facility location: every text is served by the chosen one that is most like it."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from qplug_subsa.objective import Selection, lazy_greedy
from qplug_subsa.rows import Array, as_rows, require_budget
from qplug_subsa.units import Units

_PIECE = 1 << 21  # similarities held at once


@dataclass
class FacilityLocationObjective:
    """F(S) = Σ_{u∈U} max_{s∈S} K_us, with K = ½ + ½ cos; monotone and submodular.  Memory n·d (8 bytes each); a gain costs n·d.

    Source: Lin and Bilmes 2009 (ADA518795), the objective "maximum facility location" of the papers that compare with it.
    """

    units: Units
    best: Array = field(init=False)
    vectors: Array = field(init=False)

    def __post_init__(self) -> None:
        self.best = np.zeros(self.n)
        # n² operations end long before n·d numbers fill the memory, and rows are looked at again and again
        self.vectors = self.units.block(0, self.n)

    @property
    def n(self) -> int:
        return self.units.rows.shape[0]

    @property
    def scale(self) -> float:
        return float(self.n)

    def gains(self, indices: Array) -> Array:
        out = np.zeros(len(indices))
        step = max(1, _PIECE // max(self.n, 1))
        for start in range(0, len(indices), step):
            part = indices[start : start + step]
            similar = 0.5 + 0.5 * self.vectors @ self.vectors[part].T  # [n, part]
            similar -= self.best[:, None]
            out[start : start + step] = np.maximum(similar, 0, out=similar).sum(0)
        return out

    def add(self, index: int) -> None:
        np.maximum(self.best, 0.5 + 0.5 * self.vectors @ self.vectors[index], out=self.best)


@dataclass(frozen=True)
class FacilityLocation:
    """Lazy greedy facility location: covers every part of the pool, dense or not.  n² d operations.

    centre: subtract the mean embedding first
    """

    name: ClassVar[str] = "facility-location"
    centre: bool = True

    def select(self, embeddings: Any, k: int, scores: Any = None) -> list[int]:
        """Indices in order of choice.  embeddings: [n, d];  scores are not looked at"""
        return list(self.run(embeddings, k).indices)

    def run(self, embeddings: Any, k: int) -> Selection:
        rows = as_rows(embeddings)
        require_budget(k, rows.shape[0])
        return lazy_greedy(FacilityLocationObjective(Units.of(rows, centre=self.centre)), k)
