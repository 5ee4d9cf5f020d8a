"""The graph of nearest neighbours that vote-k and IDEAL work on."""

import numpy as np

from qplug_subsa.rows import Array
from qplug_subsa.units import Units

_PIECE = 1 << 22  # similarities held at once


def nearest(units: Units, k: int) -> tuple[Array, Array]:
    """The k rows most similar to each row, itself left out, most similar first; of equal ones the lower index.  n² d operations.

    The released codes sort all similarities and drop the last, taking it for the row itself; with copies in the pool it may be another.
    → indices [n, k] int32, cosines [n, k];  k is at most n - 1
    """
    n = units.rows.shape[0]
    k = min(k, n - 1)
    indices, cosines = np.empty((n, k), np.int32), np.empty((n, k))
    step = max(1, _PIECE // max(n, 1))
    for start in range(0, n, step):
        stop = min(start + step, n)
        similar = units.dot(units.block(start, stop).T).T  # [piece, n]
        similar[np.arange(stop - start), np.arange(start, stop)] = -np.inf
        # rounding, so that copies are equal whatever order their products were summed in
        similar = np.round(similar, 12)
        for i, row in enumerate(similar):
            top = np.argpartition(-row, k - 1)[:k] if 0 < k < n - 1 else np.arange(n)
            if 0 < k < n - 1:
                edge = row[top].min()
                above = np.flatnonzero(row > edge)
                top = np.concatenate([above, np.flatnonzero(row == edge)[: k - len(above)]])
            order = np.lexsort((top, -row[top]))[:k]
            indices[start + i], cosines[start + i] = top[order], row[top[order]]
    return indices, cosines
