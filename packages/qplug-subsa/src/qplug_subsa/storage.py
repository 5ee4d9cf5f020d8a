"""How embeddings are stored in fewer bytes, and what that costs in recall.

Ranges and directions are fitted once, on embeddings of the collection; queries stay float.  Which form is best hangs on the data: measure it
(`recall`), as docs/evidence/selection.md does.

Source of the forms: the storage study catalogued as "RAG embedding storage" (float8 by cast, int8 per dimension, sign bits, PCA before either).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from qcore.errors import CalibrationError, SpecError

from qplug_subsa.rows import Array


class Form(Protocol):
    """How one vector is stored.  `fit` returns a form that knows its collection; the rest needs it."""

    name: str

    def fit(self, vectors: Array) -> "Form": ...
    def encode(self, vectors: Array) -> Array:
        """[n, d] → what is kept, one row for each vector."""

    def decode(self, stored: Array) -> Array:
        """float32 vectors that the rows stand for, in the form's own space."""

    def project(self, queries: Array) -> Array:
        """Queries in that space."""

    def nbytes(self, d: int) -> int:
        """Bytes of one vector of d dimensions."""

    def similarities(self, queries: Array, stored: Array) -> Array:
        """[queries, n] by which stored vectors are ranked."""


@dataclass(frozen=True)
class _Form:
    name: str

    def fit(self, vectors: Array) -> "_Form":
        if len(vectors) == 0 or not np.isfinite(vectors).all():
            raise CalibrationError(f"{self.name} is fitted on finite embeddings, at least one of them")
        return self

    def project(self, queries: Array) -> Array:
        return queries.astype(np.float32)

    def encode(self, vectors: Array) -> Array:
        raise NotImplementedError

    def decode(self, stored: Array) -> Array:
        raise NotImplementedError

    def similarities(self, queries: Array, stored: Array) -> Array:
        return _unit(self.project(queries)) @ _unit(self.decode(stored)).T


@dataclass(frozen=True)
class Float32(_Form):
    """As they come."""

    def encode(self, vectors: Array) -> Array:
        return vectors.astype(np.float32)

    def decode(self, stored: Array) -> Array:
        return stored

    def nbytes(self, d: int) -> int:
        return 4 * d


@dataclass(frozen=True)
class Float8(_Form):
    """Cast to E4M3 or E5M2.

    scale:  "none" = as they are (unit vectors fit) · "dim" = √d times, away from E4M3's smallest step of 2^-9 · "per-dim" = each dimension's largest
            value to 1
    """

    kind: str = "e4m3"
    scale: str = "none"
    factor: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ("e4m3", "e5m2") or self.scale not in ("none", "dim", "per-dim"):
            raise SpecError(f"float8 is e4m3 or e5m2, scaled none, dim or per-dim; got {self.kind!r} and {self.scale!r}")

    def fit(self, vectors: Array) -> "Float8":
        super().fit(vectors)
        d = vectors.shape[1]
        per = np.abs(vectors).max(0)
        factors = {"none": np.ones(d), "dim": np.full(d, np.sqrt(d)), "per-dim": 1 / np.where(per > 0, per, 1)}
        return replace(self, factor=factors[self.scale].astype(np.float32))

    def encode(self, vectors: Array) -> Array:
        import torch

        scaled = torch.from_numpy(np.ascontiguousarray(vectors, np.float32) * self.factor)
        limit = torch.finfo(self._dtype).max
        return scaled.clamp(-limit, limit).to(self._dtype).view(torch.uint8).numpy()

    def decode(self, stored: Array) -> Array:
        import torch

        return torch.from_numpy(np.ascontiguousarray(stored)).view(self._dtype).float().numpy() / self.factor

    @property
    def _dtype(self) -> Any:
        import torch

        return torch.float8_e4m3fn if self.kind == "e4m3" else torch.float8_e5m2

    def nbytes(self, d: int) -> int:
        return d


@dataclass(frozen=True)
class Int8(_Form):
    """Each dimension's range in the collection in 256 steps; values outside it are clamped."""

    low: Any = field(default=None, repr=False, compare=False)
    step: Any = field(default=None, repr=False, compare=False)

    def fit(self, vectors: Array) -> "Int8":
        super().fit(vectors)
        low, high = vectors.min(0), vectors.max(0)
        step = np.where(high > low, (high - low) / 255, 1.0)
        return replace(self, low=low.astype(np.float32), step=step.astype(np.float32))

    def encode(self, vectors: Array) -> Array:
        return np.clip(np.rint((vectors - self.low) / self.step), 0, 255).astype(np.uint8)

    def decode(self, stored: Array) -> Array:
        return stored.astype(np.float32) * self.step + self.low

    def nbytes(self, d: int) -> int:
        return d


@dataclass(frozen=True)
class Binary(_Form):
    """One bit a dimension: whether it is positive, after the collection's mean is taken off where `centre` is set.

    Ranked by the float query against ±1.
    """

    centre: bool = False
    mean: Any = field(default=None, repr=False, compare=False)

    def fit(self, vectors: Array) -> "Binary":
        super().fit(vectors)
        mean = vectors.mean(0) if self.centre else np.zeros(vectors.shape[1])
        return replace(self, mean=mean.astype(np.float32))

    def encode(self, vectors: Array) -> Array:
        return np.packbits(vectors - self.mean > 0, axis=1)

    def decode(self, stored: Array) -> Array:
        return np.unpackbits(stored, axis=1, count=len(self.mean)).astype(np.float32) * 2 - 1

    def project(self, queries: Array) -> Array:
        return queries.astype(np.float32) - self.mean

    def nbytes(self, d: int) -> int:
        return -(-d // 8)


@dataclass(frozen=True)
class PCA(_Form):
    """The first principal directions of the collection, and another form for the coordinates on them.

    The directions are those of the vectors themselves, not of their distances from the mean: so dot products, by which vectors are ranked, are
    kept as well as that many directions can keep them.

    share: of the dimensions that are kept
    then:  how coordinates are stored
    """

    share: float = 0.5
    then: Any = field(default_factory=lambda: Float32("float32"))
    directions: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SpecError(f"pca keeps a share of the dimensions over 0 and up to 1, got {self.share}")

    def fit(self, vectors: Array) -> "PCA":
        super().fit(vectors)
        x = vectors.astype(np.float64)
        _, axes = np.linalg.eigh(x.T @ x)
        fitted = replace(self, directions=axes[:, ::-1][:, : self._kept(x.shape[1])].astype(np.float32))
        return replace(fitted, then=self.then.fit(fitted.project(vectors)))

    def _kept(self, d: int) -> int:
        return max(1, round(self.share * d))

    def project(self, queries: Array) -> Array:
        return queries.astype(np.float32) @ self.directions

    def encode(self, vectors: Array) -> Array:
        return self.then.encode(self.project(vectors))

    def decode(self, stored: Array) -> Array:
        return self.then.decode(stored)

    def nbytes(self, d: int) -> int:
        return self.then.nbytes(self._kept(d))


FORMS: Mapping[str, Any] = {
    form.name: form
    for form in (
        Float32("float32"),
        Float8("float8-e4m3"),
        Float8("float8-e4m3-sqrt-d", "e4m3", "dim"),
        Float8("float8-e4m3-per-dim", "e4m3", "per-dim"),
        Float8("float8-e5m2", "e5m2"),
        Int8("int8"),
        Binary("binary"),
        Binary("binary-centred", centre=True),
        PCA("pca50"),
        PCA("pca50-float8", then=Float8("float8-e4m3")),
        PCA("pca50-int8", then=Int8("int8")),
        PCA("pca25-int8", share=0.25, then=Int8("int8")),
    )
}


def recall(found: Array, exact: Array, k: int) -> float:
    """Mean share of the k nearest by `exact` that are among the k nearest by `found`.  Both: [queries, n] similarities"""
    k = min(k, exact.shape[1])
    best = [np.argsort(-s, axis=1, kind="stable")[:, :k] for s in (found, exact)]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(*best, strict=True)]))


def _unit(vectors: Array) -> Array:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
