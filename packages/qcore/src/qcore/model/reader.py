"""Where tensors come from: one at a time, so that a model never has to be in memory whole."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qcore.errors import CheckpointError, NotFound


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
    """A reader over one safetensors file, or the shards of a folder.  Every read is a copy of its own: no pages of the file stay mapped."""

    def __init__(self, path: Path) -> None:
        self._where = _index(path)
        self._path = path

    def names(self) -> Iterable[str]:
        return self._where.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._where:
            raise NotFound(f"{self._path} has no tensor named {name!r}")
        file = self._where[name]
        try:
            with safe_open(file, framework="pt") as f:
                return f.get_tensor(name).clone()
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({e}); the file is truncated or corrupt, fetch it again") from e

    def dtype(self) -> torch.dtype:
        """The most common float dtype, judged by the largest tensors' first names; float32 where nothing is float."""
        counts: dict[torch.dtype, int] = {}
        for name in list(self._where)[:64]:
            t = self[name]
            if t.is_floating_point():
                counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
        return max(counts, key=lambda d: counts[d]) if counts else torch.float32


def _index(path: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    if path.is_file():
        files = [path]
    elif (path / "model.safetensors.index.json").is_file():
        index = path / "model.safetensors.index.json"
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as e:
            raise CheckpointError(f"{index} is not a safetensors index ({e}); fetch it again") from e
        if outside := sorted(n for n in names if Path(n).name != n):
            raise CheckpointError(f"{index} names a shard outside its folder: {outside[0]!r}; refused")
        files = [path / n for n in sorted(names)]
    else:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) if path.is_dir() else "no such folder"
            raise NotFound(f"{path} holds no *.safetensors file (there: {there or 'nothing'}); pickled weights (.bin, .pth) are not loaded")
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                where |= dict.fromkeys(f.keys(), file)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file} is not a readable safetensors file ({e}); it is missing, truncated or corrupt: fetch it again") from e
    return where


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
