"""The topology of a model that is traced in parts: torch.fx sees the sequential ones, geometry lies between them."""

from dataclasses import dataclass, field, replace

from qcore.model.plain import plain_topology
from qcore.model.topology import Axis, Block, Link, Port, Site, Topology, join
from torch import nn


@dataclass
class Parts:
    """Collects the parts of a model in the order in which they run; `topology` is what they make together."""

    model: nn.Module
    order: list[str] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    blocked: dict[Port, str] = field(default_factory=dict)

    def traced(self, path: str) -> None:
        """A part that torch.fx can trace, with the links inside it."""
        inner = plain_topology(self.model.get_submodule(path))
        self.order += [join(path, site.module) for site in inner.sites]
        self.links += [_below(path, link) for link in inner.links]
        self.blocked |= {_port(path, port): why for port, why in inner.blocked.items()}

    def alone(self, path: str, why: str) -> None:
        """One layer whose channels no link may touch, and why."""
        axes: tuple[Axis, ...] = ("out", "in")
        self.order.append(path)
        self.blocked |= {Port(f"{path}.weight", axis): why for axis in axes}

    def topology(self, activations: tuple[Site, ...] = ()) -> Topology:
        """One block, which is run again for each stage; a stage a layer."""
        block = Block("", stages=tuple((Site(path),) for path in self.order), feed="rerun")
        return Topology(blocks=(block,), links=tuple(self.links), blocked=self.blocked, activations=activations)


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
