"""Readers and look-ups over a model whose modules are being exchanged."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qcore.checkpoint.journal import FinishedBlocks
from qcore.model.reader import TensorReader
from qcore.model.topology import Site
from qcore.modules.online import Online


class StreamedValues:
    """The values of a streamed model: of finished blocks from the journal, of everything else as a run in memory would hold them."""

    def __init__(self, blocks: FinishedBlocks, reader: TensorReader, compute: torch.dtype, stored: torch.dtype) -> None:
        self._blocks, self._reader, self._compute, self._stored = blocks, reader, compute, stored

    def names(self) -> Iterable[str]:
        return dict.fromkeys([*self._blocks.names(), *self._reader.names()])

    def __contains__(self, name: object) -> bool:
        return name in self._blocks or name in self._reader

    def __getitem__(self, name: str) -> Tensor:
        if name in self._blocks:
            return self._blocks[name]
        value = self._reader[name]
        return value.to(self._compute).to(self._stored) if value.is_floating_point() else value


class Owners:
    """The float modules that parameters belong to, also where something stands in their place: they know the layouts."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.replaced: dict[str, nn.Module] = {}

    def get_submodule(self, path: str) -> nn.Module:
        return self.replaced[path] if path in self.replaced else leaf_at(self._model, path)


class LiveReader:
    """A reader that answers to the names of the live model, where a leaf with a module before it has ".leaf" in its name."""

    def __init__(self, reader: TensorReader, wrapped: set[str]) -> None:
        self._reader, self._wrapped = reader, wrapped

    def _stored_name(self, name: str) -> str:
        path, _, own = name.rpartition(".")
        outer = path.removesuffix(".leaf")
        return f"{outer}.{own}" if outer != path and outer in self._wrapped else name

    def names(self) -> Iterable[str]:
        return self._reader.names()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._stored_name(name) in self._reader

    def __getitem__(self, name: str) -> Tensor:
        return self._reader[self._stored_name(name)]


def leaf_at(model: nn.Module, path: str) -> nn.Module:
    """The leaf at a path, behind what was put before it."""
    module = model.get_submodule(path)
    return module.leaf if isinstance(module, Online) else module


def rows_of(site: Site, whole: Tensor, param: Tensor) -> Tensor | None:
    """Which rows of the weight matrix a site means; None = all.  Parts of a fused stack lie below each other."""
    if site.part is not None:
        n = whole.shape[0] // param.shape[0]
        return torch.arange(site.part * n, (site.part + 1) * n)
    if site.channels:
        return torch.cat([torch.arange(r.start, r.stop) for r in site.channels])
    return None


def round_parameters(module: nn.Module, solved: set[str], prefix: str, stored: torch.dtype) -> None:
    """Round what stays float to the dtype in which it will be stored, so that the model in memory is the model on disk."""
    for name, p in module.named_parameters(prefix=prefix):
        if name not in solved and not p.is_meta and p.is_floating_point() and stored.itemsize < p.dtype.itemsize:
            p.data = p.data.to(stored).to(p.dtype)
