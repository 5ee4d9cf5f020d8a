"""Which annotated examples are shown for one test item: the most similar ones that fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from qcore.errors import SpecError

from qplug_subsa.rows import Array, as_rows
from qplug_subsa.units import Units

# a cosine from here on is the item itself; the released code skips scores of exactly 1, which rounding rarely gives
_ITSELF = 1 - 1e-6

Centre = Literal["none", "own", "examples"]


@dataclass(frozen=True)
class Limits:
    """What fits.

    tokens:  of the whole prompt, the test item included
    example: of one example; longer ones are passed over
    shots:   examples at most; None = as many as fit
    """

    tokens: int = 1024
    example: int = 256
    shots: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "example"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.shots is not None and self.shots < 0:
            raise SpecError(f"shots is 0 or more, got {self.shots}")


def similarities(examples: Any, queries: Any, centre: Centre = "none") -> Array:
    """[queries, examples] cosines.

    centre: "own" subtracts from each set its own mean, as the released code does (a test item alone then has no direction); "examples" subtracts
            the examples' mean from both; "none" subtracts nothing
    """
    e, q = as_rows(examples), as_rows(queries)
    if e.shape[1] != q.shape[1]:
        raise SpecError(f"examples have {e.shape[1]} dimensions and test items {q.shape[1]}; embed both with one model")
    known = Units.of(e, centre=centre != "none")
    vectors = known.block(0, e.shape[0])
    if centre == "examples":
        raw = q.block(0, q.shape[0]).astype(np.float64) - known.mean
        length = np.linalg.norm(raw, axis=1, keepdims=True)
        return np.divide(raw, length, out=np.zeros_like(raw), where=length > 0) @ vectors.T
    return Units.of(q, centre=centre == "own").dot(vectors.T)


def retrieve(
    similar: Array, lengths: Sequence[int], query: int, limits: Limits, itself: Callable[[int], bool] = lambda i: False, separator: int = 0
) -> list[int]:
    """Indices of the examples for one test item, most similar first.

    From the most similar one down, examples are taken until one does not fit any more; the item itself and examples over `limits.example` are passed
    over.  Source: Sub-SA's released retrieval, which does not count what stands between examples.

    similar:   [n] cosines with the item
    lengths:   tokens of each example;  query: tokens of the item;  separator: tokens between two parts
    itself:    whether example i is the test item
    """
    chosen: list[int] = []
    used = query
    for i in np.lexsort((np.arange(len(similar)), -similar)):
        if limits.shots is not None and len(chosen) >= limits.shots:
            break
        if similar[i] >= _ITSELF or itself(int(i)) or lengths[i] > limits.example:
            continue
        if used + lengths[i] + separator > limits.tokens:
            break
        used += lengths[i] + separator
        chosen.append(int(i))
    return chosen


Order = Literal["ascending", "descending", "random"]


def ordered(chosen: Sequence[int], order: Order, rng: np.random.Generator | None = None) -> list[int]:
    """Examples, given most similar first, as they stand in the prompt: "ascending" puts the most similar one last, next to the test item."""
    if order == "ascending":
        return list(reversed(chosen))
    if order == "descending":
        return list(chosen)
    rng = np.random.default_rng(0) if rng is None else rng
    return [chosen[i] for i in rng.permutation(len(chosen))]


def knn_accuracy(similar: Array, labels: Sequence[str], truth: Sequence[str], k: int = 1) -> float:
    """Share of test items whose k nearest examples, each voting with its similarity, say the true label; of equal ones the nearest wins."""
    names = sorted(set(labels))
    code = np.array([names.index(label) for label in labels])
    right = 0
    for row, label in zip(similar, truth, strict=True):
        near = np.lexsort((np.arange(len(row)), -row))[:k]
        votes = np.bincount(code[near], weights=0.5 + 0.5 * row[near], minlength=len(names))
        best = votes[code[near]] >= votes.max() - 1e-12
        right += names[code[near[int(best.argmax())]]] == label
    return right / len(truth)
