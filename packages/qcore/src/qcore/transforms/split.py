"""Split a leaf into two whose sum it is, so that each gets numbers that suit it.

`split_leaf` is the mechanism: the leaf's parameters are dropped, those of "coarse" and "fine" derived from them, and a `sum` module takes the leaf's
place.  Sites of the two parts follow (`rewritten_topology`), and solvers, observers and packings need nothing new.  CFWS gives a 1 × 1 kernel as the
coarse part, a low-rank correction gives a product as the fine one, MQuant takes one input channel out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import AbsMax
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Port, Site, Topology
from qcore.modules.leaves import leaf_config
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.channels import seen_at
from qcore.transforms.rewrite import Edit, Insert, ModuleConfig, Permute, Put, Rewrite, Scale, Shift


@dataclass(frozen=True)
class Part:
    """One of the two leaves.

    leaf:   what it is, as `modules.leaves.leaf_config` says
    edits:  own parameter name ("weight", "0.weight") → edits that make it from the split leaf's weight; an empty tuple takes it as it is
    bias:   whether it keeps the split leaf's bias
    """

    leaf: Mapping[str, Any]
    edits: Mapping[str, tuple[Edit, ...]] = field(default_factory=dict)
    bias: bool = False


def split_leaf(path: str, module: nn.Module, coarse: Part, fine: Part, fine_channels: Tensor | None = None) -> Rewrite:
    """The leaf at `path` becomes coarse(x) + fine(x).  The caller answers for coarse + fine = the leaf; edits may leave their port's name empty.

    fine_channels: [k] input channels that the fine part reads, None for all
    """
    if coarse.bias and fine.bias:
        raise SpecError(f"{path}: only one part of a split keeps the bias")
    edits: dict[str, tuple[Edit, ...]] = {}
    derived: dict[str, str] = {}
    for child, part in (("coarse", coarse), ("fine", fine)):
        for own, changes in part.edits.items():
            name = f"{path}.{child}.{own}"
            derived[name] = f"{path}.weight"
            if changes:
                edits[name] = tuple(_named(edit, name) for edit in changes)
        if part.bias:
            derived[f"{path}.{child}.bias"] = f"{path}.bias"
    config = {
        "coarse": dict(coarse.leaf),
        "fine": dict(fine.leaf),
        "fine_channels": None if fine_channels is None else len(fine_channels),
        "channel_axis": 1 if hasattr(module, "kernel_size") else -1,
    }
    tensors = {} if fine_channels is None else {"fine_channels": fine_channels}
    dropped = frozenset(f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))
    return Rewrite(edits=edits, derived=derived, inserts={path: Insert(ModuleConfig("sum", config, tensors), "instead")}, dropped=dropped)


def _named(edit: Edit, name: str) -> Edit:
    return type(edit)(**{**edit.__dict__, "port": Port(**{**edit.port.__dict__, "param": name})})


def split_given(path: str, module: nn.Module, coarse: Tensor) -> Rewrite:
    """The leaf becomes two of its own kind: `coarse`, of the weight's shape, and the rest of the weight.  The coarse part keeps the bias."""
    leaf = leaf_config(module)
    shape = tuple(module.get_parameter("weight").shape)
    if tuple(coarse.shape) != shape:
        raise SpecError(f"{path}: the coarse part has shape {tuple(coarse.shape)}, the weight {shape}")
    own = Port("", "out")
    return split_leaf(
        path,
        module,
        Part(leaf, {"weight": (Put(own, coarse.double()),)}, bias=leaf["bias"]),
        Part({**leaf, "bias": False}, {"weight": (Shift(own, -coarse.double()),)}),
    )


def split_columns(path: str, module: nn.Module, channels: Tensor) -> Rewrite:
    """The input channels named go into a narrow leaf of their own; the coarse leaf has zeros in their place, and the bias.  channels: [k]"""
    leaf = leaf_config(module)
    inputs = "in_features" if "in_features" in leaf else "in_channels"
    if leaf.get("groups", 1) != 1:
        raise SpecError(f"{path}: a grouped convolution's input channels cannot be taken out one by one; leave it out of the split")
    k, size = len(channels), leaf[inputs]
    if not 0 < k < size:
        raise SpecError(f"{path}: {k} of {size} input channels cannot be split off; at least one must go, and one stay")
    stay = torch.ones(size, dtype=torch.float64)
    stay[channels] = 0
    port = Port("", "in")
    return split_leaf(
        path,
        module,
        Part(leaf, {"weight": (Scale(port, stay),)}, bias=leaf["bias"]),
        Part({**leaf, inputs: k, "bias": False}, {"weight": (Permute(port, channels.long()),)}),
        fine_channels=channels.long(),
    )


@dataclass(frozen=True)
class SplitColumns(Transform):
    """Keep the hardest input channels of a weight apart, in a second leaf with a spec of its own.

    Rules for "*.coarse:weight" and "*.fine:weight" say how each part is stored.  Sums of leaves have no links any more: put this transform last.

    sites:    shell patterns over weight sites
    channels: how many input channels go into the fine leaf
    by:       "input": those with the largest magnitude seen; "weight": with the largest weights, data-free

    Source: the decomposition of https://arxiv.org/abs/2208.07339 (LLM.int8(), section 3.2), chosen once instead of per batch.
    """

    name: ClassVar[str] = "split-columns"
    parts: ClassVar[tuple[str, ...]] = ("coarse", "fine")
    sites: tuple[str, ...]
    channels: int = 1
    by: Literal["input", "weight"] = "input"

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise SpecError(f"at least 1 channel is split off, got channels={self.channels}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {s.input: (AbsMax(),) for s in self._matched(topology)} if self.by == "input" else {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for site in self._matched(topology):
            module = model.get_submodule(site.module)
            lay = layout(module, site.tensor)
            w = reader[site.param]
            if self.by == "weight":
                columns = w.double().abs()
            else:
                matrix = lay.matrix(w)
                columns = lay.tensor(seen_at(site.input, AbsMax.name, seen).double().expand(matrix.shape[0], -1), w.shape)
            channels, _ = lay.channels(columns, "in")
            hardest = channels.reshape(-1, channels.shape[-1]).amax(0).topk(min(self.channels, channels.shape[-1])).indices.sort().values
            rewrite = rewrite.then(split_columns(site.module, module, hardest))
        return rewrite

    def _matched(self, topology: Topology) -> list[Site]:
        return [s for s in topology.sites if s.tensor == "weight" and s.part is None and any(fnmatchcase(str(s), p) for p in self.sites)]
