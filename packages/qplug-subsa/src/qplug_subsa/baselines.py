"""The plain selectors that Sub-SA is compared with: random, diversity, least confidence, k-means."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from qcore.errors import CalibrationError, SpecError

from qplug_subsa.objective import TIE
from qplug_subsa.rows import Array, as_rows, require_budget
from qplug_subsa.units import Units


@dataclass(frozen=True)
class Random:
    """Texts drawn without looking at them."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def select(self, embeddings: Any, k: int, scores: Any = None) -> list[int]:
        """Indices in order of choice.  embeddings: [n, d], of which only n counts;  scores are not looked at"""
        n = as_rows(embeddings).shape[0]
        require_budget(k, n)
        return [int(i) for i in np.random.default_rng(self.seed).permutation(n)[:k]]


@dataclass(frozen=True)
class Diversity:
    """From a random first text on, always the one with the smallest summed cosine to those chosen.

    seed:   chooses the first text
    centre: subtract the mean embedding first; the released code does not
    """

    name: ClassVar[str] = "diversity"
    seed: int = 0
    centre: bool = False

    def select(self, embeddings: Any, k: int, scores: Any = None) -> list[int]:
        """Indices in order of choice.  embeddings: [n, d];  scores are not looked at"""
        rows = as_rows(embeddings)
        n = rows.shape[0]
        require_budget(k, n)
        units = Units.of(rows, centre=self.centre)
        chosen = [int(np.random.default_rng(self.seed).integers(n))]
        summed = np.zeros(n)
        while len(chosen) < k:
            summed += units.dot(units.take(np.array(chosen[-1:]))[0])
            summed[chosen[-1]] = np.inf
            chosen.append(int((summed <= summed.min() + TIE * len(chosen)).argmax()))
        return chosen


@dataclass(frozen=True)
class LeastConfidence:
    """The texts of which a model is least sure, by scores from outside; what they say is not looked at."""

    name: ClassVar[str] = "least-confidence"

    def select(self, embeddings: Any, k: int, scores: Any = None) -> list[int]:
        """Indices, least confident first; of equal ones the lower index.  scores: [n] a model's confidence; CalibrationError without"""
        n = as_rows(embeddings).shape[0]
        require_budget(k, n)
        if scores is None:
            raise CalibrationError("least-confidence needs a confidence for every text; pass scores, or choose another selector")
        confidence = np.asarray(scores, np.float64)
        if confidence.shape != (n,) or not np.isfinite(confidence).all():
            raise CalibrationError(f"confidences have shape {confidence.shape}, or are not all finite; wanted {n} numbers, one for each text")
        return [int(i) for i in np.argsort(confidence, kind="stable")[:k]]


@dataclass(frozen=True)
class KMeans:
    """The text nearest to each of k centres of centred unit vectors, largest cluster first.

    seed:       of the first centres (k-means++)
    iterations: of Lloyd's algorithm, at most
    """

    name: ClassVar[str] = "k-means"
    seed: int = 0
    iterations: int = 25

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise SpecError(f"k-means wants 1 or more iterations, got {self.iterations}")

    def select(self, embeddings: Any, k: int, scores: Any = None) -> list[int]:
        """Indices, of the largest cluster first.  embeddings: [n, d];  scores are not looked at"""
        rows = as_rows(embeddings)
        n = rows.shape[0]
        require_budget(k, n)
        units = Units.of(rows)
        owner, centres = self._clusters(units, k)
        size = np.bincount(owner, minlength=k)
        distance = np.stack([_squared(units, c) for c in centres], 1)  # [n, k]
        chosen: list[int] = []
        free = np.ones(n, bool)
        for c in np.argsort(-size, kind="stable"):
            # a cluster may be empty where texts are copies: then the nearest text that is left
            near = int(np.where(free, distance[:, c], np.inf).argmin())
            chosen.append(near)
            free[near] = False
        return chosen

    def _clusters(self, units: Units, k: int) -> tuple[Array, Array]:
        rng = np.random.default_rng(self.seed)
        n = units.rows.shape[0]
        centres = [units.take(np.array([int(rng.integers(n))]))[0]]
        least = _squared(units, centres[0])
        while len(centres) < k:
            mass = np.maximum(least, 0)
            total = mass.sum()
            index = int(rng.choice(n, p=mass / total)) if total > 1e-9 else int(rng.integers(n))
            centres.append(units.take(np.array([index]))[0])
            least = np.minimum(least, _squared(units, centres[-1]))
        middle = np.stack(centres)
        owner = np.full(n, -1)
        for _ in range(self.iterations):
            now = (2 * units.dot(middle.T) - (middle**2).sum(1)).argmax(1)
            if (now == owner).all():
                break
            owner = now
            for c in range(k):
                mine = np.flatnonzero(owner == c)
                if len(mine):
                    middle[c] = units.take(mine).mean(0)
        return owner, middle


def _squared(units: Units, centre: Array) -> Array:
    """[n] ‖ê_j - centre‖², without the part that all share when ‖ê‖ = 1."""
    return 1 - 2 * units.dot(centre) + float(centre @ centre)
