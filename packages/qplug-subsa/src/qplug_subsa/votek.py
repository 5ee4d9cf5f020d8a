"""Fast vote-k: texts that are near many others, with less weight for those whose voters are served already."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from qcore.errors import SpecError

from qplug_subsa.neighbours import nearest
from qplug_subsa.objective import Selection
from qplug_subsa.rows import as_rows, require_budget
from qplug_subsa.units import Units


@dataclass(frozen=True)
class FastVoteK:
    """score(u) = Σ over unchosen voters v of u of 10^-(how many chosen texts v votes for); each text votes for its k nearest.

    k:   neighbours that a text votes for
    rho: a voter's weight is divided by this for every chosen text that it votes for

    Source: https://arxiv.org/abs/2209.01975, section 2.1 (cosines of uncentred embeddings).
    """

    name: ClassVar[str] = "vote-k"
    k: int = 150
    rho: float = 10.0

    def __post_init__(self) -> None:
        if self.k < 1 or self.rho < 1:
            raise SpecError(f"vote-k wants k and rho of 1 or more, got {self.k} and {self.rho}")

    def select(self, embeddings: Any, k: int, scores: Any = None) -> list[int]:
        """Indices in order of choice.  embeddings: [n, d];  k: how many;  scores are not looked at"""
        return list(self.run(embeddings, k).indices)

    def run(self, embeddings: Any, k: int) -> Selection:
        rows = as_rows(embeddings)
        n = rows.shape[0]
        require_budget(k, n)
        votes, _ = nearest(Units.of(rows, centre=False), self.k)  # row v: whom v votes for
        voters = np.split(np.argsort(votes.ravel(), kind="stable") // max(votes.shape[1], 1), np.cumsum(np.bincount(votes.ravel(), minlength=n))[:-1])
        weight = np.ones(n)
        score = np.bincount(votes.ravel(), minlength=n).astype(np.float64)
        free = np.ones(n, bool)
        indices, gains = [], []
        for _ in range(k):
            chosen = int(np.where(free, np.round(score, 9), -np.inf).argmax())
            indices.append(chosen)
            gains.append(float(score[chosen]))
            free[chosen] = False
            served = voters[chosen]
            before = np.where(free[served], weight[served], 0.0)
            weight[served] /= self.rho
            change = np.where(free[served], weight[served], 0.0) - before
            np.add.at(score, votes[served].ravel(), np.repeat(change, votes.shape[1]))
            # a chosen text votes no more; it is not among its own voters, for nobody votes for itself
            np.add.at(score, votes[chosen], -weight[chosen])
        return Selection(tuple(indices), tuple(gains))
