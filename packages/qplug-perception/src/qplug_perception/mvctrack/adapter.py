"""The adapter of the voxel tracker."""

from typing import ClassVar

from qcore.model.adapter import ModelAdapter
from qcore.model.plain import plain_topology
from qcore.model.topology import Axis, Block, Link, Port, Site, Topology, join
from torch import nn

from qplug_perception.gsrender.adapter import _below, _port
from qplug_perception.mvctrack.tracker import MVCTracker

_MASK = "a mask of occupied voxels lies between; nobody worked out links through it"


class MVCTrackAdapter(ModelAdapter):
    """Voxel trackers: the masked encoder, the BEV head, the MLPs.  Links are those inside the BEV head and the MLPs, as traced."""

    name: ClassVar[str] = "mvctrack"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, MVCTracker)

    def topology(self, model: nn.Module) -> Topology:
        assert isinstance(model, MVCTracker)
        order: list[str] = []
        blocked: dict[Port, str] = {}
        links: tuple[Link, ...] = ()
        axes: tuple[Axis, ...] = ("out", "in")
        for path, module in model.encoder.named_modules(prefix="encoder"):
            if isinstance(module, nn.Conv3d):
                order.append(path)
                blocked |= {Port(f"{path}.weight", axis): _MASK for axis in axes}
        for part in ("bev", *(["size"] if model.size is not None else []), "mlp"):
            inner = plain_topology(model.get_submodule(part))
            order += [join(part, s.module) for s in inner.sites]
            links += tuple(_below(part, link) for link in inner.links)
            blocked |= {_port(part, port): why for port, why in inner.blocked.items()}
        return Topology(blocks=(Block("", stages=tuple((Site(p),) for p in order), feed="rerun"),), links=links, blocked=blocked)
