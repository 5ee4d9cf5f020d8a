from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from qcore.model import Invariance, Link, Port, Site, TensorReader, Topology
from qcore.numbers import QuantSpec
from qcore.transforms import Rewrite, Transform, scale_link
from qcore.transforms.channels import share, weight_absmax
from torch import Tensor, nn


@dataclass(frozen=True)
class Scaffold(Transform):
    """Give each shared channel the same largest weight where it is written as where it is read.

    Its fields are its options: recipes fill them in.

    strength: 0 changes nothing, 1 makes both largest weights equal
    """

    name: ClassVar[str] = "scaffold"
    scope: ClassVar = "model"
    strength: float = 1.0

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Any], model: nn.Module, reader: TensorReader) -> Rewrite:
        def largest(link: Link, ports: tuple[Port, ...]) -> Tensor:
            each = torch.stack([weight_absmax(link, port, reader, model) for port in ports])
            return share(link, each.amax(0).clamp(min=1e-6))  # [C]

        rewrite = Rewrite()
        for link in topology.links_with(Invariance.SCALE):
            ratio = largest(link, link.reads) / largest(link, link.writes)
            rewrite = rewrite.then(scale_link(link, ratio ** (self.strength / 2)))
        return rewrite
