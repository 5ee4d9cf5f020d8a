"""Places: which tensors may be observed or quantized, and which channels are shared by which parameters.

A `Topology` is data.  An adapter derives it from a model's structure; every method reads it, and none knows an architecture's name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Literal

Axis = Literal["out", "in"]


@dataclass(frozen=True)
class Site:
    """A tensor that may be observed or quantized; not always a module boundary.

    module:   path of the module
    tensor:   "weight", or another parameter's name ("gate_up_proj"); "input" and "output" of the module; "q", "k", "v", "p" inside an attention
              function, "h", "delta" inside a mixer: whatever the module taps
    part:     one part of a fused stack, such as one expert
    channels: a slice of the channels: x and z of Mamba's in_proj, q, k and v of a fused projection
    role:     what rules and reports call the tensor, where that is not its name: "router" for the weight of a router, which "*:weight" does not mean
    heads, head_dim: of q, k and v: so many heads lie behind each other in its last axis, of so many channels; 0 = none, or nobody knows
    cached:   later tokens read it again, out of a cache: what a rule stores there is a policy of the cache (keys and values)
    """

    module: str
    tensor: str = "weight"
    part: int | None = None
    channels: tuple[range, ...] = ()
    role: str = field(default="", compare=False)
    heads: int = field(default=0, compare=False)
    head_dim: int = field(default=0, compare=False)
    cached: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        part = "" if self.part is None else f"[{self.part}]"
        channels = "".join(f"[{r.start}:{r.stop}]" for r in self.channels)
        return f"{self.module}:{self.role or self.tensor}{part}{channels}"

    @property
    def names(self) -> tuple[str, ...]:
        """What rules may call it.  Part 3 of "layers.0.experts:up_proj" is also "layers.0.experts.3.up_proj:weight", as if it were not fused."""
        if self.part is None:
            return (str(self),)
        own, _, of = self.tensor.partition(".")
        return str(self), f"{self.module}.{self.part}.{own}:{of or 'weight'}"

    @property
    def param(self) -> str:
        """Full name of the parameter, for sites that are one."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor

    @property
    def input(self) -> "Site":
        """What this parameter is multiplied with: the module's input, or the tap "<name>.input" for one parameter of several."""
        role = f"{self.role}.input" if self.role else ""
        return Site(self.module, "input" if self.tensor == "weight" else f"{self.tensor}.input", self.part, role=role)


class Invariance(Flag):
    """Rewrites of shared channels that leave the function unchanged."""

    PERMUTE = auto()  # channels change places
    SCALE = auto()  # each channel is multiplied by a positive number, and divided where it is read
    ROTATE = auto()  # channels are mixed by an orthogonal matrix


@dataclass(frozen=True)
class Port:
    """One axis of one parameter, on which shared channels lie.

    param:    full name, "model.layers.0.mlp.up_proj.weight"; vectors (norm gains, biases) are ports too, on axis "out"
    axis:     "out": the channels that the layer writes; "in": those that it reads
    part:     one part of a fused stack
    channels: the slice of the axis that takes part; empty = all of it
    repeat:   each head of the link stands `repeat` times in a row on this axis (grouped-query attention)
    gain:     added to the parameter to give the factor it stands for: 1 where a norm multiplies by (1 + weight)
    """

    param: str
    axis: Axis
    part: int | None = None
    channels: tuple[range, ...] = ()
    repeat: int = 1
    gain: float = 0.0

    def __str__(self) -> str:
        part = "" if self.part is None else f"[{self.part}]"
        channels = "".join(f"[{r.start}:{r.stop}]" for r in self.channels)
        return f"{self.param}{part}.{self.axis}{channels}"


@dataclass(frozen=True)
class Link:
    """One set of channels: `writes` get T, `reads` get its inverse.  Many to many.

    The residual stream is written by the embedding and by every o_proj and down_proj, and read by every q, k, v, gate and up.

    name:        for messages: "residual", "model.layers.3.v→o"
    size:        how many channels
    writes:      ports that are multiplied by T
    reads:       ports that are multiplied by T's inverse
    through:     modules between, which must absorb T: norms (their gain must be folded before a rotation, and moves with a permutation)
    invariance:  which T are allowed
    heads:       T consists of this many blocks of equal size, one a head
    share:       channels that must share one scale: "half": i and i + rotary/2 (Llama's RoPE), "interleaved": 2i and 2i + 1 (GPT-J's)
    rotary_dims: how many channels of each head RoPE turns; 0 = all of it
    """

    name: str
    size: int
    writes: tuple[Port, ...]
    reads: tuple[Port, ...]
    invariance: Invariance
    through: tuple[str, ...] = ()
    heads: int = 1
    share: Literal["none", "half", "interleaved"] = "none"
    rotary_dims: int = 0

    @property
    def ports(self) -> tuple[Port, ...]:
        return self.writes + self.reads


@dataclass(frozen=True)
class Block:
    """Modules that are solved together; blocks run in order, each on the outputs of the quantized ones before it.

    stages: sites of parameters, in the order in which they see their inputs; a stage is one observation pass
    feed:   "previous": the block's first argument is the block before's output; "rerun": passes of the model itself say what it reads
    """

    module: str
    stages: tuple[tuple[Site, ...], ...]
    feed: Literal["previous", "rerun"] = "previous"

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for stage in self.stages for site in stage)


@dataclass(frozen=True)
class Topology:
    """What an adapter knows of one model.

    blocks:   in order of execution
    links:    sets of shared channels
    blocked:  the axes of weights that no link may touch, each with the reason
    activations: sites inside modules that may be quantized (q, k, v, p …), beside the inputs of the blocks' sites
    ties:     parameter → the one that it shares its value with, as `tied_names` finds them; checkpoints store only the latter
    """

    blocks: tuple[Block, ...]
    links: tuple[Link, ...] = ()
    blocked: Mapping[Port, str] = field(default_factory=dict)
    activations: tuple[Site, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)

    def links_with(self, invariance: Invariance) -> tuple[Link, ...]:
        """The links that allow all of `invariance`."""
        return tuple(link for link in self.links if invariance in link.invariance)

    def within(self, block: Block) -> "Topology":
        """The part of this topology that concerns one block alone: links whose every port lies inside it.  Module "" is the whole model."""
        prefix = f"{block.module}." if block.module else ""
        links = tuple(link for link in self.links if all(p.param.startswith(prefix) for p in link.ports))
        return Topology(
            blocks=(block,),
            links=links,
            blocked={p: why for p, why in self.blocked.items() if p.param.startswith(prefix)},
            activations=tuple(s for s in self.activations if f"{s.module}.".startswith(prefix)),
            ties=self.ties,
        )

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for block in self.blocks for site in block.sites)


def covered_axes(topology: Topology) -> dict[tuple[str, Axis], str]:
    """Which axes of which parameters are accounted for, and by what."""
    covered: dict[tuple[str, Axis], str] = {(port.param, port.axis): why for port, why in topology.blocked.items()}
    for link in topology.links:
        covered |= {(port.param, port.axis): f"link {link.name}" for port in link.ports}
    return covered


def params_of(ports: Iterable[Port]) -> tuple[str, ...]:
    """The distinct parameter names, in order."""
    return tuple(dict.fromkeys(port.param for port in ports))


def within(path: str, parent: str) -> bool:
    """Whether a module path is `parent` itself or lies below it; everything lies below "", the whole model."""
    return not parent or path == parent or path.startswith(parent + ".")


def join(parent: str, name: str) -> str:
    """The full name of something below `parent`."""
    return f"{parent}.{name}" if parent else name
