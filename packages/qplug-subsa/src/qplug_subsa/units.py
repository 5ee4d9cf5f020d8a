"""Rows as centred unit vectors: what every cosine here is made of.

K_ij = ½ + ½ cos(e_i - μ, e_j - μ) lies in [0, 1].  A row that equals the mean (or is zero where nothing is centred) has no direction; its cosine
with everything, itself too, counts as 0, so its K is ½.  The released code of Sub-SA gives NaN there, and chooses by it.
"""

from dataclasses import dataclass

import numpy as np
from qcore.errors import CalibrationError

from qplug_subsa.group import ALONE, Group
from qplug_subsa.rows import Array, Rows, blocks

# a centred row shorter than this share of what it was made of is rounding, not direction
_NOTHING = 1e-10


@dataclass(frozen=True)
class Units:
    """ê_j = (x_j - mean) / ‖x_j - mean‖ of all rows, computed when asked for; float64.

    mean:    [d]
    inverse: [n] 1 / ‖x_j - mean‖; 0 for a row without direction
    stretch: [n] float32, ‖x_j‖ / ‖x_j - mean‖, rounded up: how much centring magnifies the rounding of x_j
    total:   [d] Σ_j ê_j, over all processes
    count:   n, over all processes
    """

    rows: Rows
    mean: Array
    inverse: Array
    stretch: Array
    total: Array
    count: int

    @classmethod
    def of(cls, rows: Rows, *, centre: bool = True, group: Group = ALONE) -> "Units":
        """Two passes over the rows.  CalibrationError that names the first row with a NaN or an infinity"""
        n, d = rows.shape
        sums = np.zeros(d + 1)
        sums[d] = n
        problem: CalibrationError | None = None
        for start, block in blocks(rows):
            sums[:d] += block.sum(0, dtype=np.float64)
            if not np.isfinite(sums[:d]).all():
                problem = _not_finite(start, block, group)
                break
        # every process learns of it: one that stopped alone would leave the others waiting
        if group.max(float(problem is not None)):
            raise problem or CalibrationError("another process found embeddings that are not finite; its message says which")
        sums = group.sum(sums)
        count = int(sums[d])
        mean = sums[:d] / max(count, 1) if centre else np.zeros(d)
        inverse, stretch, total = np.zeros(n), np.zeros(n, np.float32), np.zeros(d)
        around = float(np.linalg.norm(mean))
        for start, block in blocks(rows):
            x = block.astype(np.float64)
            raw = np.sqrt(np.einsum("ij,ij->i", x, x))
            x -= mean
            length = np.sqrt(np.einsum("ij,ij->i", x, x))
            there = length > _NOTHING * np.maximum(raw, around)
            here = slice(start, start + len(x))
            np.divide(1.0, length, out=inverse[here], where=there)
            np.nextafter((raw * inverse[here]).astype(np.float32), np.float32(np.inf), out=stretch[here])
            total += inverse[here] @ x
        return cls(rows, mean, inverse, stretch, group.sum(total), count)

    def take(self, indices: Array) -> Array:
        """[len(indices), d] unit vectors."""
        return (self.rows.take(indices).astype(np.float64) - self.mean) * self.inverse[indices, None]

    def block(self, start: int, stop: int) -> Array:
        """[stop - start, d] unit vectors."""
        return (self.rows.block(start, stop).astype(np.float64) - self.mean) * self.inverse[start:stop, None]

    def dot(self, q: Array) -> Array:
        """[n] ê_j · q, one pass.  q: [d] or [d, m], then [n, m]"""
        out = np.empty((self.rows.shape[0], *q.shape[1:]))
        for start, block in blocks(self.rows):
            x = block.astype(np.float64)
            x -= self.mean
            here = slice(start, start + len(x))
            out[here] = (x @ q) * self.inverse[here].reshape(-1, *[1] * (q.ndim - 1))
        return out

    def dot_above(self, q: Array) -> Array:
        """[n] upper bounds of ê_j · q by one float32 pass: x·q for q in float32, plus what its rounding can be.

        γ_d = d·u bounds a float32 dot product of d terms in any order of summation (Higham, Accuracy and Stability, 3.1).
        """
        n, d = self.rows.shape
        q32 = q.astype(np.float32)
        shift = float(self.mean @ q)
        unit = float(np.finfo(np.float32).eps) / 2
        slack = 1.01 * (d + 4) * unit * float(np.linalg.norm(q))
        out = np.empty(n)
        for start, block in blocks(self.rows):
            here = slice(start, start + len(block))
            out[here] = block.astype(np.float32, copy=False) @ q32
            out[here] -= shift
            out[here] *= self.inverse[here]
        out += slack * (self.stretch + 1)
        return out

    @property
    def without_direction(self) -> int:
        """How many rows of this process equal the mean."""
        return int((self.inverse == 0).sum())


def kernel(embeddings: Array, *, centre: bool = True) -> Array:
    """[n, n] K_ij = ½ + ½ cos, whole and in float64: for small pools, and to check the rest against."""
    from qplug_subsa.rows import as_rows

    units = Units.of(as_rows(embeddings), centre=centre)
    e = units.block(0, units.rows.shape[0])
    return 0.5 + 0.5 * np.clip(e @ e.T, -1, 1)


def _not_finite(start: int, block: Array, group: Group) -> CalibrationError:
    bad = ~np.isfinite(block).all(1)
    if not bad.any():
        return CalibrationError("the embeddings are too large to be summed in float64; scale them down")
    row = start + int(bad.argmax())
    where = f" of process {group.rank}" if group.size > 1 else ""
    return CalibrationError(f"the embedding in row {row}{where} (counting from 0) has a NaN or an infinity; embed that text again, or leave it out")
