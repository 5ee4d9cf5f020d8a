"""Share a layer's heaviest input channel out over all of them, by one reflection that stays in the model.

y = W·x = (W·H)·(H·x) for a reflection H, its own inverse.  W·H is merged into the weight; H·x is the run-time module `Reflect`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from qcore.model import Port, Site, TensorReader, Topology
from qcore.model.layers import layout
from qcore.numbers import QuantSpec
from qcore.transforms import Rewrite, Transform
from qcore.transforms.rewrite import Insert, ModuleConfig, Rotate
from torch import Tensor, nn


class Reflect(nn.Module):
    """x - 2·n·(n·x) / (n·n): x in a mirror whose normal is n."""

    name: ClassVar[str] = "reflect"
    normal: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("normal", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        n = self.normal.to(x.dtype)
        return x - (2 / n.square().sum()) * (x @ n).unsqueeze(-1) * n

    def config(self) -> dict[str, Any]:
        return {"channels": self.normal.numel()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)


@dataclass(frozen=True)
class Spread(Transform):
    """The reflection that maps the heaviest input channel of a layer onto all of them in equal shares."""

    name: ClassVar[str] = "spread"

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Any], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for site in topology.sites:
            if site not in specs:
                continue
            weight = layout(model.get_submodule(site.module), site.tensor).matrix(reader[site.param])  # [N, K]
            normal = _normal(weight.abs().amax(0))
            n = normal.double()
            mirror = torch.eye(len(n), dtype=n.dtype) - 2 * torch.outer(n, n) / n.square().sum()
            rewrite.edits[site.param] = (Rotate(Port(site.param, "in"), mirror.unsqueeze(0)),)
            rewrite.inserts[site.module] = Insert(ModuleConfig(Reflect.name, {"channels": len(normal)}, {"normal": normal}))
        return rewrite


def _normal(heaviness: Tensor) -> Tensor:
    """Normal of the mirror between the heaviest channel's axis and the diagonal's far end, so that it is never zero.  [K] → [K] float32"""
    normal = torch.full_like(heaviness, heaviness.numel() ** -0.5, dtype=torch.float32)
    normal[heaviness.argmax()] += 1
    return normal
