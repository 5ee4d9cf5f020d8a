"""Where tensors come from: one at a time, so that a model never has to be in memory whole."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from qcore.errors import CheckpointError, NotFound
from qcore.model.safetensors_file import SafetensorsFile, TensorInfo


class TensorReader(Protocol):
    """Tensors by name, read when asked for."""

    def names(self) -> Iterable[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def __getitem__(self, name: str) -> Tensor: ...


class DictReader:
    """A reader over tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise NotFound(f"no tensor named {name!r}; there are {len(self._tensors)}, such as {', '.join(list(self._tensors)[:3])}")
        return self._tensors[name]


class SafetensorsReader:
    """A reader over one safetensors file, or the shards of a folder.  Every read is a copy of its own: no page of a file is ever mapped."""

    def __init__(self, path: Path, files: Iterable[Path] | None = None) -> None:
        self._files = tuple(map(SafetensorsFile, shard_files(path) if files is None else files))
        self._where = {name: file for file in self._files for name in file.names()}
        self._path = path

    def names(self) -> Iterable[str]:
        return self._where.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        return self._file(name)[name]

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, without reading it."""
        return self._file(name).info(name)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._where:
            raise NotFound(f"{self._path} has no tensor named {name!r}")
        return self._where[name]

    def fingerprint(self) -> str:
        """Changes when the weights do, as far as samples of the files tell."""
        return hashlib.sha256("".join(file_fingerprint(f.path) for f in self._files).encode()).hexdigest()[:16]

    def dtype(self) -> torch.dtype:
        """The dtype of most float values; float32 where nothing is float."""
        counts: dict[torch.dtype, int] = {}
        for name in self._where:
            own = self.info(name)
            if own.dtype.is_floating_point:
                counts[own.dtype] = counts.get(own.dtype, 0) + prod(own.shape)
        return max(counts, key=lambda d: counts[d]) if counts else torch.float32


def file_fingerprint(path: Path) -> str:
    """A hash of a file's size, its ends, and 256 pieces of 64 KiB between; all of a file up to 16 MiB."""
    size, piece = path.stat().st_size, 1 << 16
    h = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for at in range(0, size, piece) if size <= 256 * piece else [*(i * (size - piece) // 255 for i in range(256))]:
            file.seek(at)
            h.update(file.read(piece))
    return h.hexdigest()[:16]


def weights_fingerprint(reader: TensorReader) -> str:
    """What tells these weights from others: the reader's own `fingerprint()`, else a hash of every tensor."""
    if callable(own := getattr(reader, "fingerprint", None)):
        return str(own())
    h = hashlib.sha256()
    for name in sorted(reader.names()):
        t = reader[name].detach().contiguous()
        h.update(f"{name}|{tuple(t.shape)}|{t.dtype}|".encode())
        if t.numel():
            h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of a model: the path itself, those that the index in this folder names, or all that lie there."""
    if path.is_file():
        return [path]
    if (path / "model.safetensors.index.json").is_file():
        index = path / "model.safetensors.index.json"
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = sorted(n for n in names if Path(n).name != n or n in ("", ".", "..") or "\0" in n)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as e:
            raise CheckpointError(f"{index} is not a safetensors index ({e}); fetch it again") from e
        if outside:
            raise CheckpointError(f"{index} names a shard outside its folder: {outside[0]!r}; refused")
        if absent := [n for n in sorted(names) if not os.path.isfile(path / n)]:  # also where a name is too long
            raise NotFound(f"{index}: {len(absent)} of {len(names)} files that it names are missing, first {absent[0]}; fetch them")
        return [path / n for n in sorted(names)]
    if files := sorted(path.glob("*.safetensors")):
        return files
    there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) if path.is_dir() else "no such folder"
    raise NotFound(f"{path} holds no *.safetensors file (there: {there or 'nothing'}); pickled weights (.bin, .pth) are not loaded")


def owned_names(module: nn.Module, prefix: str, recurse: bool = True) -> list[tuple[str, nn.Module, str, bool]]:
    """(full name, owner, own name, is parameter) of every parameter and persistent buffer of `module`, and below it."""
    found = []
    start = prefix.rstrip(".")
    # the same module may stand at two paths; both names count
    for path, m in module.named_modules(prefix=start, remove_duplicate=False) if recurse else [(start, module)]:
        head = f"{path}." if path else ""
        found += [(head + n, m, n, True) for n, p in m._parameters.items() if p is not None]
        found += [(head + n, m, n, False) for n, b in m._buffers.items() if b is not None and n not in m._non_persistent_buffers_set]
    return found


@torch.no_grad()
def materialize(module: nn.Module, prefix: str, reader: TensorReader, dtype: torch.dtype | None = None, recurse: bool = True) -> None:
    """Fill `module` in place with the reader's tensors, as they are stored; with a `dtype`, parameters are cast to it and buffers to what they were.

    prefix: path of `module` in the whole model, so that names agree with the reader's; "" for the root
    """
    for name, owner, own, is_param in owned_names(module, prefix, recurse):
        if name not in reader:
            continue
        value = reader[name]
        if is_param:
            value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            owner._parameters[own] = nn.Parameter(value, requires_grad=False)
        else:
            kept = owner._buffers[own]
            if dtype is not None and kept is not None and kept.is_floating_point() and value.is_floating_point():
                value = value.to(kept.dtype)  # a running mean that was rewritten comes in float64
            owner._buffers[own] = value


@torch.no_grad()
def release(module: nn.Module) -> None:
    """Put every parameter below `module` on meta, in place: its memory is free again."""
    for m in module.modules():
        for own, p in m._parameters.items():
            if p is not None and not p.is_meta:
                m._parameters[own] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)


def _outside(model: nn.Module, blocks: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The modules that lie in no block, with their paths."""
    inside = {id(m) for block in blocks for m in block.modules()}
    return [(path, m) for path, m in model.named_modules() if id(m) not in inside]


def materialize_outside(model: nn.Module, blocks: Iterable[nn.Module], reader: TensorReader, dtype: torch.dtype | None = None) -> None:
    """`materialize` for all that lies in no block."""
    for path, m in _outside(model, blocks):
        if any(t is not None for t in (*m._parameters.values(), *m._buffers.values())):
            materialize(m, path, reader, dtype, recurse=False)


@torch.no_grad()
def release_outside(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """`release` for all that lies in no block.  What was tied is so no more: `retie`."""
    for _, m in _outside(model, blocks):
        for own, p in m._parameters.items():
            if p is not None and not p.is_meta:
                m._parameters[own] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)


@torch.no_grad()
def evaporate(module: nn.Module) -> None:
    """Put every parameter and every buffer that a checkpoint stores on meta, in place; computed buffers stay."""
    release(module)
    for m in module.modules():
        for own, b in m._buffers.items():
            if b is not None and not b.is_meta and own not in m._non_persistent_buffers_set:
                m._buffers[own] = torch.empty_like(b, device="meta")
        if callable(changed := getattr(m, "parts_changed", None)):
            changed()


def tied_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Names that stand for one and the same parameter, such as the embedding and the output head."""
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def retie(model: nn.Module, groups: Iterable[tuple[str, ...]], unties: Iterable[str] = ()) -> None:
    """Make the names of each group one parameter again, in place, but for those that a rewrite gave a value of their own."""
    free = set(unties)
    for names in groups:
        kept = [n for n in names if n not in free]
        for name in kept[1:]:
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._parameters[own] = model.get_parameter(kept[0])


def missing_names(module: nn.Module, prefix: str = "") -> list[str]:
    """Parameters and buffers that are still on meta: nobody gave them a value."""
    return [name for name, owner, own, is_param in owned_names(module, prefix) if (owner._parameters if is_param else owner._buffers)[own].is_meta]  # type: ignore[union-attr]
