"""Embeddings as rows: in memory, or in a .npy file that is read block by block.

Nothing here holds the whole matrix: a file of 1,000,000 × 384 float32 (1.5 GB) is read through one buffer of a few megabytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from qcore.errors import CalibrationError, NotFound, SpecError

Array = NDArray[Any]

BLOCK_BYTES = 8 << 20  # float32 bytes of one block; a few such blocks are all that is held


class Rows(Protocol):
    """[n, d] numbers that are read in blocks, or row by row."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def block(self, start: int, stop: int) -> Array:
        """Rows start … stop - 1; the array may be overwritten by the next call."""

    def take(self, indices: Array) -> Array:
        """[len(indices), d]: those rows."""


class MemoryRows:
    """An array or a tensor that is in memory anyway."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    def block(self, start: int, stop: int) -> Array:
        return self.array[start:stop]

    def take(self, indices: Array) -> Array:
        return self.array[indices]


class NpyRows:
    """A .npy file of a [n, d] array in C order, from row `start` to `stop` (None = its end); pickled objects are never opened."""

    def __init__(self, path: Path, start: int = 0, stop: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise NotFound(f"embedding file {path} does not exist; pass a .npy file of shape [texts, dimensions]")
        try:
            with self.path.open("rb") as f:
                version = np.lib.format.read_magic(f)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, self.dtype = read(f)
                self._offset = f.tell()
        except ValueError as e:
            raise CalibrationError(f"{path} is no .npy file ({e}); write one with numpy.save") from e
        if len(shape) != 2 or fortran or self.dtype.kind not in "fiu":
            order = "Fortran" if fortran else "C"
            raise CalibrationError(
                f"{path} holds {self.dtype} of shape {shape} in {order} order; wanted numbers of shape [texts, dimensions] in C order"
            )
        there = self.path.stat().st_size - self._offset
        if there < shape[0] * shape[1] * self.dtype.itemsize:
            raise CalibrationError(f"{path} is cut off: {there} bytes of data, its header promises {shape[0] * shape[1] * self.dtype.itemsize}")
        stop = shape[0] if stop is None else stop
        if not 0 <= start <= stop <= shape[0]:
            raise SpecError(f"{path} has {shape[0]} rows, rows {start} to {stop} were asked for")
        self._start, self._shape = start, (stop - start, shape[1])
        self._buffer: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def block(self, start: int, stop: int) -> Array:
        d = self._shape[1]
        count = min(stop, self._shape[0]) - start
        if self._buffer is None or len(self._buffer) < count:
            self._buffer = np.empty((count, d), self.dtype)
        view = self._buffer[:count]
        # read, not mapped: mapped pages would count as resident memory until the kernel drops them
        with self.path.open("rb", buffering=0) as f:
            f.seek(self._offset + (self._start + start) * d * self.dtype.itemsize)
            _fill(f, view.data.cast("B"), self.path)
        return view

    def take(self, indices: Array) -> Array:
        d = self._shape[1]
        out = np.empty((len(indices), d), self.dtype)
        width = d * self.dtype.itemsize
        with self.path.open("rb", buffering=0) as f:
            for row, index in zip(out, indices, strict=True):
                f.seek(self._offset + (self._start + int(index)) * width)
                _fill(f, row.data.cast("B"), self.path)
        return out


def _fill(file: Any, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        got = file.readinto(target[done:])
        if not got:
            raise CalibrationError(f"{path} was cut off while it was read")
        done += got


def as_rows(embeddings: Any) -> Rows:
    """Rows of a tensor, an array, a path of a .npy file, or rows already.  SpecError for another shape"""
    if isinstance(embeddings, (MemoryRows, NpyRows)):
        return embeddings
    if isinstance(embeddings, (str, Path)):
        return NpyRows(Path(embeddings))
    if hasattr(embeddings, "detach"):
        tensor = embeddings.detach().cpu()
        # numpy has no bfloat16
        embeddings = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    array = np.asarray(embeddings)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise SpecError(f"embeddings have shape {array.shape} and dtype {array.dtype}; wanted numbers of shape [texts, dimensions]")
    return MemoryRows(array)


def blocks(rows: Rows) -> Iterator[tuple[int, Array]]:
    """(first index, rows) over all rows, each block about BLOCK_BYTES in float32."""
    n, d = rows.shape
    size = max(1, BLOCK_BYTES // (4 * max(d, 1)))
    for start in range(0, n, size):
        yield start, rows.block(start, min(start + size, n))


def require_budget(k: int, n: int) -> None:
    """SpecError unless 1 ≤ k ≤ n."""
    if k < 1:
        raise SpecError(f"a budget of {k} chooses nothing; ask for 1 to {n} of the {n} texts")
    if k > n:
        raise SpecError(f"a budget of {k} is more than the pool's {n} texts; ask for {n} or fewer, or add texts")
