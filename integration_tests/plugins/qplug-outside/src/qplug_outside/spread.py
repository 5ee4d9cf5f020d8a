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
from qcore.transforms import Insert, ModuleConfig, Rewrite, Rotate, Transform
from torch import Tensor, nn


class Reflect(nn.Module):
    """x - 2·n·(n·x) for the unit vector n."""

    name: ClassVar[str] = "reflect"
    normal: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("normal", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        n = self.normal.to(x.dtype)
        return x - 2 * (x @ n).unsqueeze(-1) * n

    def config(self) -> dict[str, Any]:
        return {"channels": self.normal.numel()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)


@dataclass(frozen=True)
class Spread(Transform):
    """The reflection that maps the heaviest input channel of a layer onto the mean of all."""

    name: ClassVar[str] = "spread"

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Any], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for site in topology.sites:
            if site not in specs:
                continue
            weight = layout(model.get_submodule(site.module), site.tensor).matrix(reader[site.param])  # [N, K]
            normal = _normal(weight.abs().amax(0))
            turn = torch.eye(len(normal), dtype=normal.dtype) - 2 * torch.outer(normal, normal)
            rewrite.edits[site.param] = (Rotate(Port(site.param, "in"), turn.unsqueeze(0)),)
            rewrite.inserts[site.module] = Insert(ModuleConfig(Reflect.name, {"channels": len(normal)}, {"normal": normal}))
        return rewrite


def _normal(heaviness: Tensor) -> Tensor:
    """Unit normal of the mirror between the heaviest channel's axis and the diagonal.  [K] → [K] float64"""
    channels = heaviness.numel()
    normal = torch.full((channels,), -(channels**-0.5), dtype=torch.float64)
    normal[heaviness.argmax()] += 1
    return torch.nn.functional.normalize(normal, dim=0)
