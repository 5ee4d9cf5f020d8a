"""The adapter of the occupancy network: 2-D and 3-D convolutions, the lift between them, and the taps of the head."""

from dataclasses import replace
from typing import ClassVar

from qcore.model.adapter import ModelAdapter
from qcore.model.plain import plain_topology
from qcore.model.topology import Axis, Block, Link, Port, Site, Topology, join
from torch import Tensor, nn

from qplug_perception.gsrender.gaussians import ATTRIBUTES
from qplug_perception.gsrender.model import Batch, OccupancyNet

_LIFT = "the lift lies between: a softmax over depths, a product, a scatter into voxels"
_HEAD = "an attribute of a Gaussian"
_FUSION = "two volumes lie behind one another here"


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
        blocked: dict[Port, str] = {}
        order: list[str] = []
        links: tuple[Link, ...] = ()
        parts: list[str | tuple[str, str]] = ["encoder", ("lift.depth", _LIFT), ("lift.context", _LIFT)]
        parts += [("fusion.conv", _FUSION)] if model.fusion is not None else []
        parts += ["volume", *((f"head.{a}.conv", _HEAD) for a in ATTRIBUTES)]
        for part in parts:
            if isinstance(part, str):
                inner = plain_topology(model.get_submodule(part))
                order += [join(part, s.module) for s in inner.sites]
                links += tuple(_below(part, link) for link in inner.links)
                blocked |= {_port(part, port): why for port, why in inner.blocked.items()}
            else:
                path, why = part
                order.append(path)
                axes: tuple[Axis, ...] = ("out", "in")
                blocked |= {Port(f"{path}.weight", axis): why for axis in axes}
        return Topology(
            blocks=(Block("", stages=tuple((Site(path),) for path in order), feed="rerun"),),
            links=links,
            blocked=blocked,
            activations=tuple(Site(f"head.{a}", "value") for a in ATTRIBUTES),
        )

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Attributes of all voxels of all samples.  [B · X·Y·Z, 7 + classes]"""
        own: Tensor = model(batch)
        return own.flatten(0, 1)


def _port(parent: str, port: Port) -> Port:
    return replace(port, param=join(parent, port.param))


def _below(parent: str, link: Link) -> Link:
    return replace(
        link,
        name=f"{parent}: {link.name}",
        writes=tuple(_port(parent, p) for p in link.writes),
        reads=tuple(_port(parent, p) for p in link.reads),
        through=tuple(join(parent, path) for path in link.through),
    )
