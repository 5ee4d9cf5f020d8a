"""Traces from files: .npz, Matrix Market (.mtx), .csv.  Every error names the file, and the line where there are lines.

.npz  a trace of `save_trace`; what `scipy.sparse.save_npz` writes (CSR and CSC); or arrays `row_ptr`, `col_idx` (and a number `columns`)
.mtx  coordinates, general or symmetric; the numbers are not read, an entry that occurs twice counts twice
.csv  a line is a loop: the numbers of the rows that it gathers, from 0; an empty line is an empty loop
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qcore.errors import CalibrationError, NotFound, QcoreError, SpecError, at

from qplug_hardware.nvr.trace import Ints, Trace
from qplug_hardware.nvr.workloads import csc, csr

SUFFIXES = (".npz", ".mtx", ".csv")
_DEFAULT_BYTES = 128


def read_trace(path: Path, row_bytes: int | None = None) -> Trace:
    """The trace in a file.  row_bytes: of a row of data; None = what the file says, else 128

    NotFound for a file that is not there, CalibrationError for one that cannot be read, SpecError for numbers out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; pass a file that ends with {', '.join(SUFFIXES)}")
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise SpecError(f"{path} ends with {kind or 'no suffix'}, which is not known here; pass one of {', '.join(SUFFIXES)}")
    with at(path):
        if kind == ".npz":
            return _npz(path, row_bytes)
        return (_mtx if kind == ".mtx" else _csv)(path, _DEFAULT_BYTES if row_bytes is None else row_bytes)


def save_trace(path: Path, trace: Trace) -> None:
    """Write a trace as .npz, to be read by `read_trace`."""
    arrays: dict[str, Any] = {f"table_{i}": t for i, t in enumerate(trace.tables)}
    arrays |= {"name": np.array(trace.name), "indices": trace.indices, "bounds": trace.loops}
    arrays |= {"rows": trace.rows, "row_bytes": trace.row_bytes, "index_bytes": trace.index_bytes, "value_bytes": trace.value_bytes}
    with Path(path).open("wb") as f:
        np.savez_compressed(f, **arrays)


def _npz(path: Path, row_bytes: int | None) -> Trace:
    try:
        with np.load(path, allow_pickle=False) as loaded:
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise CalibrationError("it is no .npz archive; write one with numpy.savez")
            arrays = {name: loaded[name] for name in loaded.files}
    except QcoreError:
        raise
    except Exception as e:  # zipfile, zlib, tokenize and numpy raise a dozen kinds of errors at damaged bytes
        raise CalibrationError(f"it cannot be read ({type(e).__name__}: {e}); wanted a complete .npz of plain arrays, without pickled objects") from e
    wide = _DEFAULT_BYTES if row_bytes is None else row_bytes
    if {"indptr", "indices", "format", "shape"} <= set(arrays):
        kind = arrays["format"].item() if arrays["format"].ndim == 0 else ""
        kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else str(kind)
        if kind not in ("csr", "csc"):
            raise SpecError(f"it holds a sparse matrix in the form {kind!r}; allowed: csr, csc")
        shape = arrays["shape"]
        if shape.shape != (2,) or shape.dtype.kind not in "iu":
            raise SpecError(f"shape is {shape.tolist()}; allowed: two integers")
        if kind == "csr":
            return csr(arrays["indptr"], arrays["indices"], int(shape[1]), wide, name=path.stem)
        return csc(arrays["indptr"], arrays["indices"], int(shape[0]), wide, name=path.stem)
    if {"row_ptr", "col_idx"} <= set(arrays):
        columns = _number(arrays, "columns", _one_more(arrays["col_idx"]))
        return csr(arrays["row_ptr"], arrays["col_idx"], columns, wide, name=path.stem)
    if {"indices", "rows", "bounds"} <= set(arrays):
        tables: list[NDArray[Any]] = []
        while f"table_{len(tables)}" in arrays:
            tables.append(arrays[f"table_{len(tables)}"])
        name = str(arrays["name"]) if arrays.get("name", np.zeros(1)).ndim == 0 else path.stem
        numbers = (_number(arrays, "index_bytes", 4), _number(arrays, "value_bytes", 0))
        wide = _number(arrays, "row_bytes", _DEFAULT_BYTES) if row_bytes is None else row_bytes
        return Trace(name, arrays["indices"], _number(arrays, "rows", 1), wide, tuple(tables), arrays["bounds"], *numbers)
    raise CalibrationError(
        f"it holds {', '.join(sorted(arrays)) or 'no arrays'}; wanted: indptr, indices, format and shape (scipy.sparse.save_npz), row_ptr and "
        "col_idx, or a trace that save_trace wrote"
    )


def _number(arrays: Mapping[str, NDArray[Any]], name: str, default: int) -> int:
    if name not in arrays:
        return default
    if arrays[name].ndim or arrays[name].dtype.kind not in "iu":
        raise SpecError(f"{name} is an array of {arrays[name].dtype} with shape {arrays[name].shape}; allowed: one integer")
    return int(arrays[name])


def _one_more(indices: NDArray[Any]) -> int:
    """The fewest rows that these indices need."""
    return int(indices.max()) + 1 if indices.size and indices.dtype.kind in "iu" and indices.max() >= 0 else 1


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise CalibrationError(f"byte {e.start} is no UTF-8; it must be a text file") from e


def _mtx(path: Path, row_bytes: int) -> Trace:
    lines = _lines(path)
    head = lines[0].lower().split() if lines else []
    if head[:2] != ["%%matrixmarket", "matrix"] or len(head) != 5:
        raise CalibrationError("line 1: no Matrix Market header, such as '%%MatrixMarket matrix coordinate real general'")
    if head[2] != "coordinate" or head[4] not in ("general", "symmetric", "skew-symmetric", "hermitian"):
        raise SpecError(f"line 1: a matrix that is {head[2]} and {head[4]}; allowed: coordinate, and general, symmetric, skew-symmetric or hermitian")
    body = [(i, line.split()) for i, line in enumerate(lines[1:], 2) if line.strip() and not line.startswith("%")]
    if not body:
        raise CalibrationError("there is no line with the numbers of rows, columns and entries")
    rows, columns, entries = _integers(*body[0], 3)
    if len(body) - 1 != entries:
        raise CalibrationError(f"{len(body) - 1} entries, its header promises {entries}; the file is cut off, or two were joined")
    if not entries:
        raise SpecError("a matrix without entries gathers nothing")
    pairs = np.array([_integers(i, words[:2], 2) for i, words in body[1:]], np.int64) - 1
    for i, (r, c) in zip((i for i, _ in body[1:]), pairs, strict=True):
        if not (0 <= r < rows and 0 <= c < columns):
            raise SpecError(f"line {i}: entry ({r + 1}, {c + 1}); allowed: (1, 1) to ({rows}, {columns})")
    if head[4] != "general":
        pairs = np.concatenate([pairs, pairs[pairs[:, 0] != pairs[:, 1], ::-1]])
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    # empty rows visit nothing; a header that promises 10^15 of them must not be believed with memory
    first = np.flatnonzero(np.concatenate([[True], np.diff(pairs[:, 0]) > 0]))
    row_ptr = np.concatenate([first, [len(pairs)]])
    return csr(row_ptr, pairs[:, 1], columns if head[4] == "general" else max(rows, columns), row_bytes, name=path.stem)


def _csv(path: Path, row_bytes: int) -> Trace:
    loops: list[list[int]] = []
    for i, line in enumerate(_lines(path), 1):
        words = [w.strip() for w in line.split(",")] if line.strip() else []
        loops.append(_integers(i, words, len(words)))
    indices: Ints = np.array([k for loop in loops for k in loop], np.int64)
    if not len(indices):
        raise CalibrationError("it holds no numbers")
    row_ptr = np.concatenate([[0], np.cumsum([len(loop) for loop in loops])])
    return csr(row_ptr, indices, _one_more(indices), row_bytes, name=path.stem)


def _integers(line: int, words: list[str], count: int) -> list[int]:
    if len(words) < count:
        raise CalibrationError(f"line {line}: {len(words)} numbers; wanted {count}")
    out = []
    for word in words[:count]:
        # int() would take 1_000 and other digits than 0 to 9
        if not (word.isascii() and word.isdigit() and len(word) < 19):
            raise CalibrationError(f"line {line}: {word[:40]!r} is no whole number from 0 to 10^18")
        out.append(int(word))
    return out
