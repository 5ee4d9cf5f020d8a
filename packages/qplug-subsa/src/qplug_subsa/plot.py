"""Where texts lie on a plane: the two directions in which the pool spreads most."""

from dataclasses import dataclass

import numpy as np

from qplug_subsa.rows import Array, blocks
from qplug_subsa.units import Units


@dataclass(frozen=True)
class Plane:
    """directions: [d, 2] principal directions of the centred unit vectors;  share: of their variance that each carries"""

    directions: Array
    share: tuple[float, float]

    def place(self, vectors: Array) -> Array:
        """[m, 2] of [m, d] unit vectors."""
        return vectors @ self.directions


def principal_plane(units: Units) -> Plane:
    """One pass, memory d²; the sign of a direction is that of its largest entry, so a map looks the same every time."""
    n, d = units.rows.shape
    second = np.zeros((d, d))
    for start, block in blocks(units.rows):
        x = (block.astype(np.float64) - units.mean) * units.inverse[start : start + len(block), None]
        second += x.T @ x
    mean = units.total / max(units.count, 1)
    covariance = second / max(n, 1) - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    top = vectors[:, ::-1][:, :2]
    if top.shape[1] < 2:
        top = np.concatenate([top, np.zeros((d, 2 - top.shape[1]))], 1)
    top = top * np.where(top[np.abs(top).argmax(0), np.arange(2)] < 0, -1.0, 1.0)
    spread = np.maximum(values[::-1], 0)
    total = spread.sum()
    parts = [float(s / total) if total > 0 else 0.0 for s in (*spread[:2], 0.0)][:2]
    return Plane(top, (parts[0], parts[1]))
