"""One safetensors file: read tensor by tensor into memory of its own, written tensor by tensor.

The library `safetensors` maps files into memory, so that every page that is read counts as resident, and it writes only what lies in memory all
at once.  Here a read goes into a buffer that belongs to the caller, and a write takes one tensor at a time.  The format is the library's: 8 bytes of
header length, a JSON header, the data without gaps (https://github.com/huggingface/safetensors, "Format").

A header is hostile until checked: lengths against the file, every entry's type, shape and place, no overlap and no hole.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcore.errors import CheckpointError, NotFound

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 25_000_000  # bytes: some 200,000 tensors; more is refused, since parsing takes a multiple of it
_STEP = 1 << 28  # a single read or write is at most 2 GiB on Linux


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.  start, stop: bytes from the beginning of the file"""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """The tensors of one file.  CheckpointError for whatever is no whole safetensors file; nothing but the header is read until asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors, self.metadata = _header(path)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise NotFound(f"{self.path} has no tensor named {name!r}")
        return self._tensors[name]

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of its own: changing it changes no file, and no page of the file stays mapped."""
        own = self.info(name)
        buffer = torch.empty(own.stop - own.start, dtype=torch.uint8)
        if buffer.numel():
            view, done = buffer.numpy().data, 0
            try:
                with open(self.path, "rb", buffering=0) as file:
                    file.seek(own.start)
                    while done < len(view):
                        got = file.readinto(view[done : done + _STEP])
                        if not got:
                            raise CheckpointError(f"{self.path} ends inside tensor {name!r}: it was cut while it was read; fetch it again")
                        done += got
            except OSError as e:
                raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read ({e})") from e
        return buffer.view(own.dtype).view(own.shape)


def _header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    def broken(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a whole safetensors file: {what}; it is truncated or corrupt: fetch it again")

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise broken(f"the header claims {length} bytes, the file has {size}")
            text = file.read(length)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e})") from e
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise broken(f"its header is no JSON ({e})") from e
    if not isinstance(table, dict):
        raise broken("its header is no table")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise broken("its metadata are no table of strings")
    tensors, begin = {}, 8 + length
    for name, entry in table.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise broken(f"the entry of {name!r} is not dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise broken(f"{name!r} has dtype {dtype!r}; known: {', '.join(DTYPES)}")
        if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise broken(f"{name!r} has shape {shape!r}")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)):
            raise broken(f"{name!r} has offsets {offsets!r}")
        if offsets[1] - offsets[0] != prod(shape) * DTYPES[dtype].itemsize:
            raise broken(f"{name!r} takes {offsets[1] - offsets[0]} bytes, its shape {shape} of {dtype} {prod(shape) * DTYPES[dtype].itemsize}")
        tensors[name] = TensorInfo(DTYPES[dtype], tuple(shape), begin + offsets[0], begin + offsets[1])
    at = begin
    for name, own in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if own.start != at:
            raise broken(f"{name!r} starts at byte {own.start}, where byte {at} was expected: tensors lie without gaps")
        at = own.stop
    if at != size:
        raise broken(f"its tensors end at byte {at}, the file has {size}")
    return tensors, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands there twice")
    return table


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    value: Callable[[str], Tensor] | None = None,
) -> None:
    """Write tensors under their names, and flush the file to the disk.

    tensors: dtype and shape of each, and its values unless `value` is given; may then be on meta
    value:   the values of one tensor, asked for when it is written, so that no two are in memory because of this function
    """
    # wide elements first, so that every tensor is aligned to its element size, as the library does
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        t = tensors[name]
        if t.dtype not in _NAMES:
            raise CheckpointError(f"{name} has dtype {t.dtype}, which safetensors cannot hold")
        size = t.numel() * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        _write(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            t = tensors[name] if value is None else value(name)
            if t.dtype != tensors[name].dtype or t.shape != tensors[name].shape:
                raise CheckpointError(f"{name}: {t.dtype} {tuple(t.shape)} came, {tensors[name].dtype} {tuple(tensors[name].shape)} was announced")
            if t.numel():
                _write(file, t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def _write(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done : done + _STEP])
