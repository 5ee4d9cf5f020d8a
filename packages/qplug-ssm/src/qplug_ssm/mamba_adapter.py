"""One adapter for models of Mamba blocks, by structure: transformers' Mamba, FalconMamba, Mamba2 and Jamba, Vim's and this plug-in's own.

`prepare` puts this plug-in's mixers in the place of the family's own (mixer.py says why); everything else is found by following the parts' names.
Fused projections are slices of one weight: x and z of in_proj, δ, B and C of x_proj.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from qcore.model.adapter import ModelAdapter, tied_names
from qcore.model.layers import Layout, by_type
from qcore.model.tap import RunContext
from qcore.model.topology import Axis, Block, Invariance, Link, Port, Site, Topology
from torch import Tensor, nn

from qplug_ssm.mixer import SelectiveMixer, a_log, adopted, looks_like_mixer
from qplug_ssm.mixer2 import HeadMixer, looks_like_head_mixer

ALL = Invariance.PERMUTE | Invariance.SCALE | Invariance.ROTATE
_HYBRID = "attention, experts and MLPs of a hybrid model are not followed by this adapter"


@by_type.register(SelectiveMixer)
def _(module: nn.Module, name: str) -> Layout:
    """A_log [D, N]: channels of the mixer × states."""
    return Layout(
        matrix=lambda w: w,
        tensor=lambda m, shape: m.reshape(shape),
        rows=lambda x: x.reshape(-1, x.shape[-1]),
        channels=lambda w, axis: (w.movedim(0 if axis == "out" else 1, -1), lambda c: c.movedim(-1, 0 if axis == "out" else 1)),
    )


@dataclass(frozen=True)
class Layer:
    """One block of the model.  norm: what feeds the mixer; "" where nobody knows.  alone: nothing else of weight is in the block"""

    block: str
    mixer: str
    norm: str
    alone: bool


class MambaAdapter(ModelAdapter):
    """Models whose blocks hold a Mamba mixer each, at least some of them."""

    name: ClassVar[str] = "mamba"
    priority: ClassVar[int] = 2

    def matches(self, model: nn.Module) -> bool:
        return any(is_mixer(m) for m in model.modules())

    def prepare(self, model: nn.Module) -> None:
        for path, module in [(p, m) for p, m in model.named_modules() if is_mixer(m) and not isinstance(m, SelectiveMixer)]:
            model.set_submodule(path, HeadMixer(module) if looks_like_head_mixer(module) else adopted(module))

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits."""
        if not hasattr(model, "get_output_embeddings"):
            return model(batch if isinstance(batch, Tensor) else batch["input_ids"])
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        for key in ("labels", "row_weight"):
            inputs.pop(key, None)
        return model(**inputs, use_cache=False).logits

    def context(self, batch: Any) -> RunContext:
        if isinstance(batch, Tensor):
            return RunContext()
        mask = batch.get("attention_mask")
        return RunContext(valid=None if mask is None else mask.bool(), weight=float(batch.get("row_weight", 1.0)))

    def topology(self, model: nn.Module) -> Topology:
        layers = list(find_layers(model))
        links: list[Link] = []
        activations: list[Site] = []
        for layer in layers:
            if layer.mixer:
                mixer: Any = model.get_submodule(layer.mixer)
                links += mixer_links(layer, mixer, model.get_submodule(layer.norm) if layer.norm else None)
                activations += [Site(f"{layer.mixer}.{r}", t) for r in mixer.readouts for t in ("h", "c")]
        links += outer_links(model, layers)
        blocks = tuple(Block(layer.block, stages_of(model, layer)) for layer in layers)
        return Topology(blocks, tuple(links), _blocked(model, links), tuple(activations), tied_names(model))


def is_mixer(module: nn.Module) -> bool:
    return isinstance(module, SelectiveMixer) or looks_like_mixer(module) or looks_like_head_mixer(module)


def find_layers(model: nn.Module) -> Iterator[Layer]:
    """The blocks in order of execution: the children of the list that holds the mixers."""
    mixers = [p for p, m in model.named_modules() if isinstance(m, SelectiveMixer)]
    lists = [p for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and mixers and mixers[0].startswith(f"{p}.")]
    outer = lists[0]
    children: Any = model.get_submodule(outer)
    for index, block in enumerate(children):
        path = f"{outer}.{index}"
        own = [p for p in mixers if p.startswith(f"{path}.")]
        norms = [n for n, m in block.named_children() if is_norm(m)]
        others = [n for n, m in block.named_children() if n not in norms and f"{path}.{n}" not in own and any(True for _ in m.parameters())]
        norm = next((f"{path}.{n}" for n in ("norm", "input_layernorm") if n in norms), "")
        yield Layer(path, own[0] if own else "", norm, alone=bool(own) and not others)


def is_norm(module: nn.Module) -> bool:
    """A gain, perhaps a bias, and no other parameter; a norm by name."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1


def out(param: str, *channels: range) -> Port:
    return Port(param, "out", channels=channels)


def into(param: str, *channels: range) -> Port:
    return Port(param, "in", channels=channels)


def ports(module: nn.Module, path: str, *channels: range) -> tuple[Port, ...]:
    """What a leaf writes: its weight, and its bias where it has one."""
    biased = getattr(module, "bias", None) is not None
    return (out(f"{path}.weight", *channels), *((out(f"{path}.bias", *channels),) if biased else ()))


def mixer_links(layer: Layer, mixer: Any, norm: Any) -> list[Link]:
    """Channels shared inside one block."""
    path = layer.mixer
    links = []
    if norm is not None:
        reads = (into(f"{path}.in_proj.weight"),)
        links.append(Link(f"{path}.norm→in_proj", mixer.in_proj.in_features, ports(norm, layer.norm), reads, Invariance.SCALE))
    return links + (head_links(path, mixer) if isinstance(mixer, HeadMixer) else selective_links(path, mixer))


def selective_links(path: str, mixer: Any) -> list[Link]:
    inner, rank, states = mixer.out_proj.in_features, mixer.rank, mixer.states
    x, z = range(inner), range(inner, 2 * inner)
    delta, b, c = range(rank), range(rank, rank + states), range(rank + states, rank + 2 * states)
    links = []
    whole: list[Port] = [*ports(mixer.in_proj, f"{path}.in_proj", x), *ports(mixer.in_proj, f"{path}.in_proj", z)]
    reads = [into(f"{path}.out_proj.weight")]
    conv_reads = tuple(into(f"{path}.conv1d{tail}.weight") for tail in mixer._tails)
    # a depthwise convolution acts on every channel by itself, and its bias comes after
    links.append(Link(f"{path}.x→conv", inner, ports(mixer.in_proj, f"{path}.in_proj", x), conv_reads, Invariance.SCALE))
    for tail in mixer._tails:
        x_proj, dt_proj = f"{path}.x_proj{tail}", f"{path}.dt_proj{tail}"
        projection, normed = getattr(mixer, f"x_proj{tail}"), "dt_layernorm" in mixer._modules
        whole += ports(getattr(mixer, f"conv1d{tail}"), f"{path}.conv1d{tail}")
        whole += [*ports(getattr(mixer, f"dt_proj{tail}"), dt_proj), out(f"{path}.{a_log(tail)}"), out(f"{path}.D{tail}")]
        reads.append(into(f"{x_proj}.weight"))
        writes_delta, writes_b, writes_c = (ports(projection, x_proj, part) for part in (delta, b, c))
        through: tuple[str, ...] = ()
        if normed:
            through = (f"{path}.dt_layernorm",)
            gained = bool(list(mixer.dt_layernorm.parameters()))
            if gained:
                links.append(
                    Link(f"{path}.dt_layernorm→dt_proj", rank, (out(f"{path}.dt_layernorm.weight"),), (into(f"{dt_proj}.weight"),), Invariance.SCALE)
                )
                links.append(
                    Link(f"{path}.B·C", states, (out(f"{path}.b_layernorm.weight"),), (out(f"{path}.c_layernorm.weight"),), Invariance.SCALE)
                )
        else:
            # the recurrence is linear in B: what B is multiplied by, the state is, and C takes out again.  S4
            links.append(Link(f"{x_proj}.B·C", states, writes_b, writes_c, Invariance.SCALE))
        allowed = Invariance.PERMUTE | Invariance.ROTATE if normed else ALL
        links.append(Link(f"{x_proj}.delta", rank, writes_delta, (into(f"{dt_proj}.weight"),), allowed, through))
        norms = tuple(f"{path}.{n}" for n in ("b_layernorm", "c_layernorm")) if normed else ()
        links.append(Link(f"{x_proj}.states", states, (*writes_b, into(f"{path}.{a_log(tail)}")), writes_c, Invariance.PERMUTE, norms))
    links.append(Link(f"{path}.channels", inner, tuple(whole), tuple(reads), Invariance.PERMUTE))
    return links


def head_links(path: str, mixer: Any) -> list[Link]:
    inner, mixed = mixer.inner, mixer.inner + 2 * mixer.groups * mixer.states
    xbc = range(inner, inner + mixed)
    return [
        Link(f"{path}.xBC→conv", mixed, ports(mixer.in_proj, f"{path}.in_proj", xbc), (into(f"{path}.conv1d.weight"),), Invariance.SCALE),
        Link(f"{path}.norm→out_proj", inner, (out(f"{path}.norm.weight"),), (into(f"{path}.out_proj.weight"),), Invariance.SCALE),
    ]


def outer_links(model: nn.Module, layers: list[Layer]) -> list[Link]:
    """The residual stream, and the last norm."""
    if not all(layer.alone and layer.norm for layer in layers):
        return []
    embeds = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Embedding)]
    prefix = layers[0].block.rpartition(".")[0]
    outside = [(p, m) for p, m in model.named_modules() if not p.startswith(prefix)]
    heads = [(p, m) for p, m in outside if isinstance(m, nn.Linear)]
    norms = [(p, m) for p, m in outside if is_norm(m)]
    if len(embeds) != 1 or len(heads) != 1 or len(norms) != 1:
        return []
    (embed, _), (head, _), (last, norm) = embeds[0], heads[0], norms[0]
    size = model.get_submodule(layers[0].mixer).in_proj.in_features  # type: ignore[union-attr]
    every = [model.get_submodule(layer.norm) for layer in layers] + [norm]
    allowed = Invariance.PERMUTE if any(isinstance(m, nn.LayerNorm) for m in every) else Invariance.PERMUTE | Invariance.ROTATE
    mixers: list[Any] = [model.get_submodule(layer.mixer) for layer in layers]
    writes = [out(f"{embed}.weight"), *(p for layer, m in zip(layers, mixers, strict=True) for p in ports(m.out_proj, f"{layer.mixer}.out_proj"))]
    reads = [*(into(f"{layer.mixer}.in_proj.weight") for layer in layers), into(f"{head}.weight")]
    return [
        Link(f"{last}→{head}", size, ports(norm, last), (into(f"{head}.weight"),), Invariance.SCALE),  # type: ignore[arg-type]
        Link("residual", size, tuple(writes), tuple(reads), allowed, (*(layer.norm for layer in layers), last)),  # type: ignore[arg-type]
    ]


def stages_of(model: nn.Module, layer: Layer) -> tuple[tuple[Site, ...], ...]:
    """Weights in the order in which they see their inputs."""
    block, path = model.get_submodule(layer.block), layer.mixer
    if not path:
        return tuple((Site(f"{layer.block}.{n}"),) for n, m in block.named_modules() if isinstance(m, nn.Linear))
    mixer: Any = model.get_submodule(path)
    stages: list[tuple[Site, ...]] = [(Site(f"{path}.in_proj"),)]
    if isinstance(mixer, HeadMixer):
        stages.append((Site(f"{path}.conv1d"),))
    else:
        for name in ("conv1d", "x_proj", "dt_proj"):
            stages.append(tuple(Site(f"{path}.{name}{tail}") for tail in mixer._tails))
    stages.append((Site(f"{path}.out_proj"),))
    rest = [n for n, m in block.named_modules() if isinstance(m, nn.Linear) and not f"{layer.block}.{n}".startswith(f"{path}.")]
    return (*stages, *((Site(f"{layer.block}.{n}"),) for n in rest))


def _blocked(model: nn.Module, links: list[Link]) -> dict[Port, str]:
    """Every axis of every weight that no link has."""
    taken = {(port.param, port.axis) for link in links for port in link.ports}
    axes: tuple[Axis, ...] = ("out", "in")
    blocked = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            param = f"{path}.{name}" if path else name
            for axis in axes:
                if p.ndim > 1 and (param, axis) not in taken:
                    blocked[Port(param, axis)] = _reason(module, param, axis)
    return blocked


def _reason(module: nn.Module, param: str, axis: Axis) -> str:
    if isinstance(module, nn.Embedding):
        return "token ids: their order is the vocabulary's" if axis == "in" else _HYBRID
    leaf = param.removesuffix(".weight").rpartition(".")[2]
    if leaf in ("in_proj", "conv1d", "out_proj", "x_proj"):
        return f"the channels of {leaf} are paired by heads and norms, or written to a stream that could not be followed"
    return "the model's output, or a part that this adapter does not follow" if ".layers." not in param else _HYBRID
