"""The adapter of the occupancy network: 2-D and 3-D convolutions, the lift between them, and the taps of the head."""

from collections.abc import Mapping
from typing import ClassVar

from qcore.model.adapter import ModelAdapter
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec
from torch import Tensor, nn

from qplug_perception.gsrender.gaussians import ATTRIBUTES
from qplug_perception.gsrender.model import Batch, OccupancyNet
from qplug_perception.parts import Parts

_LIFT = "the lift lies between: a softmax over depths, a product, a scatter into voxels"


class GSRenderAdapter(ModelAdapter):
    """Occupancy networks with a Gaussian head.

    Links are those of the image encoder and of the 3-D network, as traced; the lift and the head have none.  Attributes are tapped at
    `head.delta_mu:value`, `head.delta_s:value`, `head.opacity:value`, `head.semantic:value`.
    """

    name: ClassVar[str] = "gsrender"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, OccupancyNet)

    def topology(self, model: nn.Module) -> Topology:
        assert isinstance(model, OccupancyNet)
        parts = Parts(model)
        parts.traced("encoder")
        parts.alone("lift.depth", _LIFT)
        parts.alone("lift.context", _LIFT)
        if model.fusion is not None:
            parts.alone("fusion.conv", "two volumes lie behind one another here")
        parts.traced("volume")
        for attribute in ATTRIBUTES:
            parts.alone(f"head.{attribute}.conv", "an attribute of a Gaussian")
        return parts.topology(tuple(Site(f"head.{a}", "value") for a in ATTRIBUTES))

    def problems(self, model: nn.Module, specs: Mapping[Site, QuantSpec]) -> list[str]:
        """The regions of the opacity's numbers meet at the network's threshold, or it is none of them."""
        assert isinstance(model, OccupancyNet)
        spec = specs.get(Site("head.opacity", "value"))
        wrong = [] if spec is None else [model.other_threshold(spec.format)]
        return [why for why in wrong if why]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Attributes of all voxels of all samples.  [B · X·Y·Z, 7 + classes]"""
        own: Tensor = model(batch)
        return own.flatten(0, 1)
