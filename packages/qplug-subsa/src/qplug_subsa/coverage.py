"""How well the chosen texts stand for the pool."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from qplug_subsa.rows import Array
from qplug_subsa.units import Units


@dataclass(frozen=True)
class Coverage:
    """Figures of one selection; similarities are cosines of centred embeddings.

    nearest:    mean over the pool of the similarity to the nearest chosen text: what facility location maximizes
    worst:      the 5 % quantile of the same: how well the least covered part is covered
    redundancy: mean similarity of two chosen texts
    """

    nearest: float
    worst: float
    redundancy: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def coverage(units: Units, chosen: Sequence[int]) -> Coverage:
    """Figures of one selection; memory n + k·d."""
    return coverage_of(units, chosen, nearest_similarity(units, chosen))


def coverage_of(units: Units, chosen: Sequence[int], best: Array) -> Coverage:
    """The same, where the similarities to the nearest chosen text, `best` [n], are there already."""
    e = units.take(np.asarray(chosen))
    inner = e @ e.T
    pairs = len(chosen) * (len(chosen) - 1)
    redundancy = float((inner.sum() - inner.trace()) / pairs) if pairs else 0.0
    return Coverage(float(best.mean()), float(np.quantile(best, 0.05)), redundancy)


def nearest_similarity(units: Units, chosen: Sequence[int]) -> Array:
    """[n] cosine with the nearest chosen text; 1 for the chosen themselves."""
    return nearest_chosen(units, chosen)[0]


def nearest_chosen(units: Units, chosen: Sequence[int]) -> tuple[Array, Array, Array]:
    """Similarity to the nearest chosen text [n], which one that is [n], and the mean over the pool for the first 1 … k chosen [k].

    One pass for every 64 chosen texts.
    """
    e = units.take(np.asarray(chosen))
    n = units.rows.shape[0]
    best, which, curve = np.full(n, -np.inf), np.zeros(n, np.int32), []
    for start in range(0, len(e), 64):
        similar = units.dot(e[start : start + 64].T)  # [n, 64]
        for j in range(similar.shape[1]):
            similar[chosen[start + j], j] = 1.0  # also for a text without direction
            nearer = similar[:, j] > best
            which[nearer] = start + j
            np.maximum(best, similar[:, j], out=best)
            curve.append(best.mean())
    return best, which, np.array(curve)


def random_coverage(units: Units, k: int, draws: int = 5, seed: int = 0) -> Coverage:
    """The mean coverage of random selections: what the figures of a selection are to be read against."""
    found = [coverage(units, np.random.default_rng(seed + i).permutation(units.rows.shape[0])[:k].tolist()) for i in range(draws)]
    return Coverage(*(float(np.mean([getattr(c, key) for c in found])) for key in ("nearest", "worst", "redundancy")))
