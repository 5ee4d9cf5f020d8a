"""Adapters for plain networks, by structure: stacks of linear layers, and convolutional networks.

The model is traced with `torch.fx`, and every tensor that flows through it carries three streams, one for each invariance: a stream is a set of
channels with the ports that write and read it.  A layer starts new streams and reads those of its input; a module between either lets a stream
pass, adds ports to it, or stops it with a reason.  An addition makes its operands' streams one, so residual networks have links with many writers.

| between two layers | permute | scale | rotate |
|---|---|---|---|
| nothing, dropout, zero padding, average pooling | passes | passes | passes |
| ReLU, leaky ReLU, max pooling | passes | passes | stops |
| GELU, SiLU, sigmoid … | passes | stops | stops |
| batch norm, layer norm | its vectors move too | its gain and bias write the channels behind it | stops |
| depthwise convolution | moves too | reads and writes | stops |
| flatten | stops, unless one value a channel is left | each channel stands for a range of inputs | stops, likewise |
| concatenation, a product, a transposed convolution, anything unknown | stops | stops | stops |

A network that cannot be traced has sites and no links; so has every layer that is used more than once.
"""

import operator
from collections import Counter
from dataclasses import dataclass, field
from math import lcm, prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from qcore.model.adapter import ModelAdapter, tied_names
from qcore.model.topology import Axis, Block, Invariance, Link, Port, Site, Topology, covered_axes

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVS)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # run, stay float, and no stream passes them
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm)
PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, *PADS)
AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU)  # f(s·x) = s·f(x) for s > 0
ELEMENTWISE = (
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.ELU, nn.SELU, nn.CELU, nn.Softplus),
    *(nn.LogSigmoid, nn.Softsign),
)
KNOWN = (*LAYERS, *TRANSPOSED, *NORMS, *SAME, *AVERAGES, *MAXIMA, *HOMOGENEOUS, *ELEMENTWISE, nn.Flatten)

_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, F.leaky_relu, "relu"), "homogeneous"),
    **dict.fromkeys(
        (F.gelu, F.silu, F.sigmoid, F.tanh, F.relu6, F.hardswish, F.elu, F.softplus, torch.sigmoid, torch.tanh, "sigmoid", "tanh"), "elementwise"
    ),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d), "homogeneous"),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.dropout), "same"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((torch.flatten, "flatten"), "flatten"),
}
KINDS = (Invariance.PERMUTE, Invariance.SCALE, Invariance.ROTATE)


@dataclass(eq=False)
class _Stream:
    """Channels that one T would have to treat alike; `stopped` says why no T may.

    groups: T is block-diagonal with so many blocks, for grouped convolutions
    """

    size: int = 0
    groups: int = 1
    writes: list[Port] = field(default_factory=list)
    reads: list[Port] = field(default_factory=list)
    stopped: str = ""
    joined: "_Stream | None" = None

    def root(self) -> "_Stream":
        stream = self
        while stream.joined is not None:
            stream = stream.joined
        return stream

    def stop(self, why: str) -> None:
        root = self.root()
        root.stopped = root.stopped or why

    def join(self, other: "_Stream") -> None:
        a, b = self.root(), other.root()
        if a is b:
            return
        if a.size != b.size:
            a.stop(f"{a.size} and {b.size} channels are added")
        a.groups = lcm(a.groups, b.groups)
        a.writes += b.writes
        a.reads += b.reads
        a.stopped = a.stopped or b.stopped
        b.joined = a


@dataclass
class _Flow:
    """One tensor: its streams by invariance, whether spatial axes were flattened into channels, and whether none are left to flatten."""

    streams: dict[Invariance, _Stream]
    axis: int = -1  # where the channels lie: 1 behind a convolution
    flat: bool = False
    pooled: bool = False


class _Tracer(fx.Tracer):
    """Takes the layers that are known here as they are, and every module that a checkpoint may contain; torch's own tracer looks into the latter."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = any(isinstance(m, kind) and type(m).forward is kind.forward for kind in KNOWN)
        return known or hasattr(type(m), "from_config") or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the model's forward pass, with its layers as calls.  Raises whatever the forward does with a traced tensor."""
    return _Tracer().trace(model)


class _Walk:
    """Carries flows through a traced graph, and keeps the streams that it met."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.streams: list[tuple[Invariance, _Stream]] = []
        self.reasons: dict[tuple[str, Axis], dict[Invariance, _Stream]] = {}
        self.order: list[str] = []

    def run(self, graph: fx.Graph) -> None:
        uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
        flows: dict[fx.Node, _Flow] = {}
        for node in graph.nodes:
            inputs = [flows[n] for n in node.all_input_nodes]
            if node.op == "call_module":
                flows[node] = self._module(str(node.target), self.model.get_submodule(str(node.target)), inputs, uses[node.target])
            elif node.op == "output":
                self._stop(inputs, "the model's output")
            elif node.op == "placeholder":
                flows[node] = self._fresh(0, stopped="the model's input")
            else:
                flows[node] = self._function(node, inputs)

    def _fresh(self, size: int, stopped: str = "", **kwargs: Any) -> _Flow:
        streams = {kind: _Stream(size, stopped=stopped) for kind in KINDS}
        self.streams += streams.items()
        return _Flow(streams, **kwargs)

    def _stop(self, flows: list[_Flow], why: str, kinds: tuple[Invariance, ...] = KINDS) -> None:
        for flow in flows:
            for kind in kinds:
                flow.streams[kind].stop(why)

    def _unknown(self, flows: list[_Flow], why: str) -> _Flow:
        self._stop(flows, why)
        return self._fresh(0, stopped=why)

    def _function(self, node: fx.Node, inputs: list[_Flow]) -> _Flow:
        kind = _FUNCTIONS.get(node.target)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if kind == "add" and len(inputs) == 2 and inputs[0].axis == inputs[1].axis and not (inputs[0].flat or inputs[1].flat):
            for k in KINDS:
                inputs[0].streams[k].join(inputs[1].streams[k])
            return inputs[0]
        if kind in ("same", "homogeneous", "elementwise") and len(inputs) == 1:
            return self._pointwise(kind, f"passes {name}", inputs[0])
        if kind == "flatten" and len(inputs) == 1 and tuple(node.args[1:]) in ((1,), (1, -1)) and not node.kwargs:
            return self._flatten(inputs[0])
        return self._unknown(inputs, f"passes {name}, which the plain adapters do not follow")

    def _pointwise(self, kind: str, why: str, flow: _Flow) -> _Flow:
        if kind != "same":
            self._stop([flow], why, (Invariance.ROTATE,) if kind == "homogeneous" else (Invariance.SCALE, Invariance.ROTATE))
        return flow

    def _flatten(self, flow: _Flow) -> _Flow:
        return flow if flow.axis == -1 else _Flow(flow.streams, axis=-1, flat=not flow.pooled, pooled=flow.pooled)

    def _module(self, path: str, module: nn.Module, inputs: list[_Flow], uses: int) -> _Flow:
        where = f"passes {path} ({type(module).__name__})"
        if isinstance(module, LAYERS) and path not in self.order:
            self.order.append(path)
        if len(inputs) != 1:
            return self._unknown(inputs, f"{where} with {len(inputs)} inputs")
        flow = inputs[0]
        if uses > 1 and list(module.parameters()):
            out = self._unknown(inputs, f"{path} is used {uses} times")
            self._note(path, module, flow, out)
            return out
        if isinstance(module, LAYERS):
            return self._layer(path, module, flow)
        if isinstance(module, NORMS):
            return self._norm(path, module, flow)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self._flatten(flow)
        if isinstance(module, (*AVERAGES, *MAXIMA)):
            flow = self._pointwise("same" if isinstance(module, AVERAGES) else "homogeneous", where, flow)
            size = getattr(module, "output_size", None)
            one = size is not None and all(s == 1 for s in (size if isinstance(size, tuple) else (size,)))
            return _Flow(flow.streams, flow.axis, flow.flat, pooled=flow.pooled or one)
        for kind, types in (("same", SAME), ("homogeneous", HOMOGENEOUS), ("elementwise", ELEMENTWISE)):
            if isinstance(module, types):
                return self._pointwise(kind, where, flow)
        out = self._unknown(inputs, f"{where}, which the plain adapters do not follow")
        self._note(path, module, flow, out)
        return out

    def _note(self, path: str, module: nn.Module, flow: _Flow, out: _Flow) -> None:
        if isinstance(module, (*LAYERS, *TRANSPOSED)):
            self.reasons[f"{path}.weight", "in"] = dict(flow.streams)
            self.reasons[f"{path}.weight", "out"] = dict(out.streams)

    def _layer(self, path: str, module: Any, flow: _Flow) -> _Flow:
        conv = isinstance(module, CONVS)
        groups = module.groups if conv else 1
        size = module.out_channels if conv else module.out_features
        inputs = module.in_channels if conv else module.in_features
        weight, axis = f"{path}.weight", 1 if conv else -1
        if any(flow.streams[k].root().size for k in KINDS) and flow.axis != axis:
            self._stop([flow], f"the channels are not on the axis that {path} reads")
        # depthwise: output i is made of input i alone, so a permutation passes right through
        depthwise = groups == inputs == size and groups > 1
        for kind in KINDS:
            if not (depthwise and kind is Invariance.PERMUTE):
                self._read(flow.streams[kind].root(), kind, Port(weight, "in"), inputs, groups, flow.flat)
        own = [Port(weight, "out"), *([Port(f"{path}.bias", "out")] if module.bias is not None else [])]
        out = self._fresh(size, axis=axis)
        for kind, stream in out.streams.items():
            stream.groups = 1 if depthwise or kind is Invariance.SCALE else groups
            stream.writes += own
        self._note(path, module, flow, out)
        if depthwise:
            flow.streams[Invariance.PERMUTE].root().join(out.streams[Invariance.PERMUTE])
            for stream in (flow.streams[Invariance.ROTATE], out.streams[Invariance.ROTATE]):
                stream.stop(f"{path} is depthwise")
        return out

    def _read(self, stream: _Stream, kind: Invariance, port: Port, inputs: int, groups: int, flat: bool) -> None:
        repeat = inputs // stream.size if stream.size and inputs % stream.size == 0 else 0
        if stream.size and (repeat == 0 or (repeat > 1 and not flat)):
            stream.stop(f"{stream.size} channels meet {inputs} inputs of {port.param}")
        elif repeat > 1 and kind is not Invariance.SCALE:
            stream.stop(f"each channel is flattened into {repeat} inputs of {port.param}")
        elif repeat > 1:
            # as many heads as channels, each of which stands `repeat` times in a row
            stream.groups = stream.size
            port = Port(port.param, "in", repeat=repeat)
        elif kind is not Invariance.SCALE:
            stream.groups = lcm(stream.groups, groups)
        stream.reads.append(port)

    def _norm(self, path: str, module: Any, flow: _Flow) -> _Flow:
        size = prod(module.normalized_shape) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else module.num_features
        why = f"passes {path} ({type(module).__name__})"
        whole = isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1
        last_only = isinstance(module, nn.LayerNorm | nn.RMSNorm) and flow.axis != -1
        if whole or last_only or flow.flat or size != flow.streams[Invariance.PERMUTE].root().size:
            return self._unknown([flow], f"{why}, which does not normalize the channels one by one")
        self._stop([flow], why, (Invariance.SCALE, Invariance.ROTATE))
        out = _Flow(dict(flow.streams), flow.axis, flow.flat, flow.pooled)
        out.streams |= {k: s for k, s in self._fresh(size).streams.items() if k is not Invariance.PERMUTE}
        vectors = [
            n for n, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)] if t is not None and t.shape == (size,)
        ]
        flow.streams[Invariance.PERMUTE].root().writes += [Port(f"{path}.{n}", "out") for n in vectors]
        out.streams[Invariance.SCALE].writes += [Port(f"{path}.{n}", "out") for n in ("weight", "bias") if n in vectors]
        if "weight" not in vectors:
            out.streams[Invariance.SCALE].stop(f"{path} has no gain to scale")
        out.streams[Invariance.ROTATE].stop(why)
        return out


def links_of(streams: list[tuple[Invariance, _Stream]]) -> tuple[Link, ...]:
    """Streams that nothing stopped, those with the same ports as one link."""
    found: dict[tuple[Any, ...], Link] = {}
    for kind, stream in streams:
        if stream.joined is not None or stream.stopped or not stream.writes or not stream.reads:
            continue
        writes, reads = tuple(stream.writes), tuple(stream.reads)
        if stream.groups == stream.size and kind is not Invariance.SCALE:
            continue  # one channel to a block: the identity is all that is left
        key = (frozenset(writes), frozenset(reads))
        old = found.get(key)
        heads = stream.groups if old is None else max(stream.groups, old.heads)  # scales do not mind heads
        invariance = kind if old is None else old.invariance | kind
        name = f"{'+'.join(dict.fromkeys(_module(p) for p in writes))}→{'+'.join(dict.fromkeys(_module(p) for p in reads))}"
        found[key] = Link(name, stream.size, writes, reads, invariance, heads=heads)
    return tuple(found.values())


def _module(port: Port) -> str:
    return port.param.rpartition(".")[0]


def plain_topology(model: nn.Module) -> Topology:
    """The topology of a traceable network of known layers; sites without links, and the reason, where it cannot be traced."""
    walk = _Walk(model)
    links: tuple[Link, ...] = ()
    problem = ""
    try:
        walk.run(trace(model))
        links = links_of(walk.streams)
    except Exception as e:  # whatever the model's forward does with a traced tensor
        problem = f"not a chain: torch.fx cannot trace {type(model).__name__} ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
    named = [path for path, m in model.named_modules() if isinstance(m, LAYERS)]
    order = [*walk.order, *(path for path in named if path not in walk.order)] if not problem else named
    blocks = (Block("", stages=tuple((Site(path),) for path in order), feed="rerun"),) if order else ()
    covered = covered_axes(Topology(blocks, links))
    blocked = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        axis: Axis
        for axis in ("out", "in"):
            if p.ndim > 1 and (name, axis) not in covered:
                blocked[Port(name, axis)] = problem or _why(walk, name, axis)
    return Topology(blocks, links, blocked, ties=tied_names(model))


def _why(walk: _Walk, name: str, axis: Axis) -> str:
    streams = {kind: s.root() for kind, s in walk.reasons.get((name, axis), {}).items()}
    if not streams:
        return "no layer that the forward pass reaches"
    depthwise = axis == "in" and getattr(walk.model.get_submodule(name.rpartition(".")[0]), "groups", 1) > 1
    alone = "a group has one channel, which moves with the outputs" if depthwise else "a group has one channel"
    whys = {k: s.stopped or ("nothing reads it" if not s.reads else alone) for k, s in streams.items()}
    if len(set(whys.values())) == 1:
        return next(iter(whys.values()))
    return "; ".join(f"{kind.name}: {why}" for kind, why in whys.items())


def _leaves(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if not any(True for _ in m.children())]


def _all_known(model: nn.Module) -> bool:
    owned = all(isinstance(m, KNOWN) for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    return owned and all(isinstance(m, KNOWN) for m in _leaves(model))


class PlainMLP(ModelAdapter):
    """Networks of linear layers, activations and norms."""

    name: ClassVar[str] = "plain-mlp"
    priority: ClassVar[int] = -10  # a family's own adapter knows more

    def matches(self, model: nn.Module) -> bool:
        kinds = [m for m in model.modules() if isinstance(m, LAYERS) and m is not model]
        return bool(kinds) and all(isinstance(m, nn.Linear) for m in kinds) and _all_known(model)

    def topology(self, model: nn.Module) -> Topology:
        return plain_topology(model)


class PlainCNN(ModelAdapter):
    """Convolutional networks, residual ones too: convolutions, batch norms, activations, pooling, linear heads."""

    name: ClassVar[str] = "plain-cnn"
    priority: ClassVar[int] = -10

    def matches(self, model: nn.Module) -> bool:
        return any(isinstance(m, CONVS) for m in model.modules() if m is not model) and _all_known(model)

    def topology(self, model: nn.Module) -> Topology:
        return plain_topology(model)
