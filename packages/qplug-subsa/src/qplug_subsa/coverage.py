"""How well the chosen texts stand for the pool."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from qplug_subsa.rows import Array, blocks
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

    One pass over the rows; beside the results it holds one block of similarities.
    """
    e = units.take(np.asarray(chosen))
    n = units.rows.shape[0]
    best, which, curve = np.empty(n), np.empty(n, np.int32), np.zeros(len(e))
    place = np.full(n, -1, np.int32)
    place[np.asarray(chosen)] = np.arange(len(e))
    for start, block in blocks(units.rows):
        here = slice(start, start + len(block))
        similar = ((block.astype(np.float64) - units.mean) * units.inverse[here, None]) @ e.T  # [block, k]
        own = np.flatnonzero(place[here] >= 0)
        similar[own, place[here][own]] = 1.0  # also for a text without direction
        which[here] = similar.argmax(1)
        so_far = np.maximum.accumulate(similar, axis=1)
        best[here] = so_far[:, -1]
        curve += so_far.sum(0)
    return best, which, curve / n


def random_coverage(units: Units, k: int, draws: int = 5, seed: int = 0) -> Coverage:
    """The mean coverage of random selections: what the figures of a selection are to be read against."""
    found = [coverage(units, np.random.default_rng(seed + i).permutation(units.rows.shape[0])[:k].tolist()) for i in range(draws)]
    return Coverage(*(float(np.mean([getattr(c, key) for c in found])) for key in ("nearest", "worst", "redundancy")))
