"""Rotation magnitude suppression: after an online Hadamard rotation one input channel holds the sums of the weight's rows, and is kept apart.

Row j of H that is constant turns w into √d·mean(w): where the mean of a row of W is far from zero this one channel is much larger than the others,
and sets the scale of the whole row.  Where the predicate holds, y = A₁…B₁… + a₀b₀: the other channels in one leaf, this one in a leaf of its own
with a spec of its own.  What is split is exact in float.

The rotation is a plain Hadamard matrix on this axis: random signs would spread the mean over no single channel, and over sizes without a constant row
(some Paley matrices) there is none to split; `mean_channel` says which it is.

Source: https://arxiv.org/abs/2502.00425 (MQuant), section 3.4.  In the released code channel 0 stays floating point and both products run in
float32; here both leaves are quantized as the recipe says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import log, sqrt
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.topology import Port, Site, Topology
from qcore.modules.leaves import build_leaf, leaf_config
from qcore.numbers import QuantSpec
from qcore.numbers.hadamard import hadamard, padded_size, transform
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Hadamard, Insert, ModuleConfig, Permute, Rewrite, Scale
from torch import Tensor, nn


class RotatedSum(nn.Module):
    """y = coarse(h with channel c zero) + fine(h_c), h = pad(x)·Hᵀ: a linear layer behind a rotation, one of whose channels is a leaf of its own.

    size: channels of x;  padded: of h;  channel: c
    """

    name: ClassVar[str] = "rotated-sum"

    def __init__(self, coarse: nn.Module, fine: nn.Module, size: int, padded: int, channel: int) -> None:
        super().__init__()
        self.coarse = coarse
        self.fine = fine
        self.size, self.padded, self.channel = size, padded, channel
        self._leaves = {"coarse": leaf_config(coarse), "fine": leaf_config(fine)}  # the children may be replaced by quantized ones

    def forward(self, x: Tensor) -> Tensor:
        h = transform(F.pad(x, (0, self.padded - self.size)))
        apart = h[..., self.channel : self.channel + 1]
        others = torch.cat([h[..., : self.channel], torch.zeros_like(apart), h[..., self.channel + 1 :]], -1)
        return self.coarse(others) + self.fine(apart)

    def config(self) -> dict[str, Any]:
        return {**self._leaves, "size": self.size, "padded": self.padded, "channel": self.channel}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(build_leaf(config["coarse"]), build_leaf(config["fine"]), config["size"], config["padded"], config["channel"])


def mean_channel(size: int) -> int | None:
    """The row of the Hadamard matrix of this size whose entries are all alike, or None."""
    h = hadamard(size, normalize=False)
    rows = (h.sum(1).abs() == size).nonzero().flatten()
    return int(rows[0]) if len(rows) else None


def large_means(w: Tensor) -> Tensor:
    """For every row of W [N, d]: whether √d·|mean| is larger than the largest of d Gaussian numbers of its spread is expected to be, σ√(2 ln d).
    [N] bool

    Source: MQuant, theorem in section 3.4.
    """
    d = w.shape[1]
    w = w.double()
    return sqrt(d) * w.mean(1).abs() > w.std(1, unbiased=False) * sqrt(2 * log(d))


@dataclass(frozen=True)
class SuppressMagnitude(Transform):
    """Rotate the inputs of layers at run time by a plain Hadamard matrix, and split the channel of means off where the predicate holds.

    sites: shell patterns over weight sites: the second layer of the tower's feed-forwards
    when:  "most": where the predicate holds for more than half of the weight's rows; "any": for one; "never": rotate alone (the baseline)

    Rules for "*.coarse:weight" and "*.fine:weight" (and ":input") say how the parts are stored.
    """

    name: ClassVar[str] = "suppress-magnitude"
    scope: ClassVar[Literal["block", "model"]] = "model"
    parts: ClassVar[tuple[str, ...]] = ("coarse", "fine")
    sites: tuple[str, ...] = ("*.fc2:weight",)
    when: Literal["most", "any", "never"] = "most"

    def __post_init__(self) -> None:
        if self.when not in ("most", "any", "never"):
            raise SpecError(f"suppress-magnitude splits when most or any of the rows have large means, or never; got {self.when!r}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def foresee(self, topology: Topology, specs: Mapping[Site, QuantSpec], model: nn.Module) -> list[str]:
        """What can be said before anything is fitted; SpecError where no layer matches."""
        if not self._matched(topology):
            raise SpecError(f"suppress-magnitude: no weight site matches {', '.join(self.sites)}")
        return []

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite, split = Rewrite(), []
        sites = self._matched(topology)
        for site in sites:
            module = model.get_submodule(site.module)
            if type(module) is not nn.Linear:
                raise SpecError(f"suppress-magnitude: {site.module} is a {type(module).__name__}, only linear layers are rotated at run time")
            padded = padded_size(module.in_features)
            channel, holds = mean_channel(padded), large_means(reader[site.param])
            if channel is not None and self._splits(holds):
                split.append(site.module)
                rewrite = rewrite.then(_split(site, module, padded, channel))
            else:
                rewrite = rewrite.then(_rotated(site, module, padded))
        said = f"suppress-magnitude: {len(split)} of {len(sites)} layers have rows with large means, and their channel of means is a leaf of its own"
        return replace(rewrite, notes=(said,) if sites and self.when != "never" else ())

    def _splits(self, holds: Tensor) -> bool:
        share = float(holds.double().mean())
        return share > 0.5 if self.when == "most" else share > 0 and self.when == "any"

    def _matched(self, topology: Topology) -> list[Site]:
        return [s for s in topology.sites if s.tensor == "weight" and s.part is None and any(fnmatchcase(str(s), p) for p in self.sites)]


def _rotated(site: Site, module: nn.Linear, padded: int) -> Rewrite:
    ones = torch.ones(padded, dtype=torch.float64)
    config = ModuleConfig("hadamard", {"size": module.in_features, "padded": padded}, {"signs": ones.float()})
    return Rewrite(edits={site.param: (Hadamard(Port(site.param, "in"), ones, padded),)}, inserts={site.module: Insert(config)})


def _split(site: Site, module: nn.Linear, padded: int, channel: int) -> Rewrite:
    path, leaf = site.module, leaf_config(module)
    ones, stay = torch.ones(padded, dtype=torch.float64), torch.ones(padded, dtype=torch.float64)
    stay[channel] = 0
    coarse, fine = Port(f"{path}.coarse.weight", "in"), Port(f"{path}.fine.weight", "in")
    derived = {coarse.param: site.param, fine.param: site.param}
    if leaf["bias"]:
        derived[f"{path}.coarse.bias"] = f"{path}.bias"
    config = {
        "coarse": {**leaf, "in_features": padded},
        "fine": {**leaf, "in_features": 1, "bias": False},
        "size": module.in_features,
        "padded": padded,
        "channel": channel,
    }
    return Rewrite(
        edits={
            coarse.param: (Hadamard(coarse, ones, padded), Scale(coarse, stay)),
            fine.param: (Hadamard(fine, ones, padded), Permute(fine, torch.tensor([channel]))),
        },
        derived=derived,
        inserts={path: Insert(ModuleConfig(RotatedSum.name, config), "instead")},
        dropped=frozenset(f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)),
    )
