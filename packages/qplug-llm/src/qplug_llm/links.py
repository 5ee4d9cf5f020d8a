"""From facts to candidates: which ports would share channels, in a model of any size."""

from dataclasses import dataclass
from typing import Any, Literal

from qcore.model.topology import Invariance, Link, Port
from torch import nn

from qplug_llm import twin
from qplug_llm.experts import DOWN, gate_channels, up_name
from qplug_llm.experts import features as expert_features
from qplug_llm.structure import BlockFacts, Facts, Slot, features

_SHARES: tuple[Literal["half", "interleaved"], ...] = ("half", "interleaved")
_ALL = Invariance.PERMUTE | Invariance.SCALE | Invariance.ROTATE


@dataclass(frozen=True)
class Candidate:
    """A link that may be true.

    key:      names it among the candidates of its block's kind: equal in the twin and in the real model
    variants: the same ports with other rules for shared scales; the first one that is proven is taken
    """

    key: tuple[int | None, str]
    variants: tuple[Link, ...]


def _ports(model: nn.Module, path: str, axis: str, channels: tuple[range, ...] = (), repeat: int = 1, gain: float = 0.0) -> tuple[Port, ...]:
    """The ports of a module on one side: its weight, and its bias where it writes.  A path may name a fused parameter: all of its experts."""
    owner, param, bias = resolve(model, path)
    ports = [Port(f"{owner}.{param}", axis, channels=channels, repeat=repeat, gain=gain)]  # type: ignore[arg-type]
    if axis == "out" and getattr(model.get_submodule(owner), bias, None) is not None:
        ports.append(Port(f"{owner}.{bias}", "out", channels=channels, repeat=repeat))
    return tuple(ports)


def resolve(model: nn.Module, path: str) -> tuple[str, str, str]:
    """(module, its matrix, its bias) of a linear's path, or of a fused parameter's."""
    parent, _, own = path.rpartition(".")
    if own in ("gate_up_proj", "up_proj", DOWN) and isinstance(getattr(model.get_submodule(parent), own, None), nn.Parameter):
        return parent, own, f"{own}_bias"
    return path, "weight", "bias"


def _reads(model: nn.Module, paths: tuple[str, ...]) -> tuple[Port, ...]:
    return tuple(port for path in paths for port in _ports(model, path, "in"))


def _size(model: nn.Module, path: str) -> int:
    return model.get_parameter(f"{path}.weight").shape[0]


def block_candidates(model: nn.Module, block: str, kind: int, facts: BlockFacts, gains: dict[str, float]) -> list[Candidate]:
    """The candidates inside one block of `model`.  gains: by path relative to the block"""

    def full(path: str) -> str:
        return f"{block}.{path}"

    found = []

    def add(name: str, *variants: Link) -> None:
        found.append(Candidate((kind, name), variants))

    for feed in facts.feeds:
        norm = full(feed.norm)
        writes = _ports(model, norm, "out", gain=gains.get(feed.norm, 0.0))
        reads = _reads(model, tuple(full(r) for r in feed.readers))
        name = f"{feed.norm}→{'·'.join(r.rsplit('.', 1)[-1] for r in feed.readers)}"
        add(name, Link(f"{block}.{name}", _size(model, norm), writes, reads, Invariance.SCALE))

    for stack in facts.stacks:
        found += _expert_candidates(model, full(stack), kind, stack)
    if facts.attention:
        found += _attention_candidates(model, block, kind, facts, gains)
    for inner in facts.inner:
        reader = full(inner.reader)
        size = features(model.get_submodule(reader))[0]
        reads = _ports(model, reader, "in")
        through = (full(inner.norm),) if inner.norm else ()
        slices: list[tuple[str, tuple[range, ...]]] = [(w, ()) for w in inner.writers]
        if inner.halves:
            slices = [(inner.writers[0], (range(size),)), (inner.writers[0], (range(size, 2 * size),))]
        last = inner.reader.rsplit(".", 1)[-1]
        writers = tuple(p for w, channels in slices for p in _ports(model, full(w), "out", channels))
        name = f"{'·'.join(dict.fromkeys(w.rsplit('.', 1)[-1] for w, _ in slices))}→{last}"
        add(name, Link(f"{block}.{name}", size, writers, reads, _ALL if len(slices) == 1 else Invariance.PERMUTE, through))
        if len(slices) > 1:
            for i, (w, channels) in enumerate(slices):
                name = f"{w.rsplit('.', 1)[-1]}{'' if not channels else f'[{i}]'}→{last}"
                add(name, Link(f"{block}.{name}", size, _ports(model, full(w), "out", channels), reads, Invariance.SCALE, through))
    return found


def _expert_candidates(model: nn.Module, path: str, kind: int, name: str) -> list[Candidate]:
    """Inside each expert: up (and gate) → down.  One verdict serves all experts of a stack: they are computed alike."""
    module: Any = model.get_submodule(path)
    size, up = expert_features(module)[1], f"{path}.{up_name(module)}"
    gate, rows = gate_channels(module)
    if module.has_gate and not rows:
        return []  # interleaved: an edit for each channel would be needed, and their gates are clamped anyway
    found = []
    for expert in range(module.num_experts):
        reads = (Port(f"{path}.{DOWN}", "in", part=expert),)

        def writes(channels: tuple[range, ...], expert: int = expert) -> tuple[Port, ...]:
            ports = [Port(up, "out", part=expert, channels=channels)]
            return (*ports, Port(f"{up}_bias", "out", part=expert, channels=channels)) if module.has_bias else tuple(ports)

        both = writes(gate) + writes(rows) if gate else writes(())
        link = Link(f"{path}.{expert}.up→down", size, writes(rows), reads, Invariance.SCALE)
        found.append(Candidate((kind, f"{name}.up→down"), (link,)))
        link = Link(f"{path}.{expert}.gate·up→down", size, both, reads, Invariance.PERMUTE)
        found.append(Candidate((kind, f"{name}.gate·up→down"), (link,)))
    return found


def _attention_candidates(model: nn.Module, block: str, kind: int, facts: BlockFacts, gains: dict[str, float]) -> list[Candidate]:
    config: Any = model.config
    dim: int = getattr(model.get_submodule(f"{block}.{facts.attention}"), "head_dim", None) or twin.head_dim(config)
    heads, kv = config.num_attention_heads, twin.kv_heads(config)
    found = []

    def full(path: str) -> str:
        return f"{block}.{path}"

    def slot_ports(slot: Slot, repeat: int = 1) -> tuple[Port, ...]:
        return _ports(model, full(slot.linear), "out", slot.channels(heads, kv, dim), repeat)

    if facts.v is not None and facts.out:
        reads = (Port(f"{full(facts.out)}.weight", "in", repeat=heads // kv),)
        found.append(Candidate((kind, "v→o"), (Link(f"{block}.v→o", kv * dim, slot_ports(facts.v), reads, _ALL, heads=kv),)))

    size, link_heads = kv * dim, kv
    k_ports: tuple[Port, ...] = ()
    q_ports: tuple[Port, ...] = ()
    if facts.q_norm and facts.k_norm:
        # a norm stands between the projection and the rotary embedding: its gain is where the scale lives
        k_size, q_size = _size(model, full(facts.k_norm)), _size(model, full(facts.q_norm))
        k_ports = _ports(model, full(facts.k_norm), "out", gain=gains.get(facts.k_norm, 0.0))
        repeat = 1 if q_size == k_size else heads // kv
        q_ports = _ports(model, full(facts.q_norm), "out", repeat=repeat, gain=gains.get(facts.q_norm, 0.0))
        size, link_heads = k_size, max(1, k_size // dim)
    elif facts.q is not None and facts.k is not None:
        k_ports, q_ports = slot_ports(facts.k), slot_ports(facts.q, heads // kv)
    if k_ports and q_ports:
        turned = twin.turned_dims(model)
        turned = 0 if turned >= dim else turned
        plain = Link(f"{block}.k·q", size, k_ports, q_ports, _ALL, heads=link_heads)
        shared = [Link(plain.name, size, k_ports, q_ports, Invariance.SCALE, heads=link_heads, share=share, rotary_dims=turned) for share in _SHARES]
        found.append(Candidate((kind, "k·q"), (plain, *shared)))
    return found


def model_candidates(model: nn.Module, blocks: str, facts: Facts, kind_of: list[int]) -> tuple[list[Candidate], Candidate | None]:
    """The candidates outside the blocks, and the residual stream.  kind_of: which of `facts.blocks` each block of `model` is like"""
    found = []
    for feed in facts.feeds:
        writes = _ports(model, feed.norm, "out", gain=facts.gains.get(feed.norm, 0.0))
        name = f"{feed.norm}→{'·'.join(feed.readers)}"
        found.append(Candidate((None, name), (Link(name, _size(model, feed.norm), writes, _reads(model, feed.readers), Invariance.SCALE),)))
    for writer, reader in facts.chains:
        size = features(model.get_submodule(reader))[0]
        name = f"{writer}→{reader}"
        found.append(Candidate((None, name), (Link(name, size, _ports(model, writer, "out"), _ports(model, reader, "in"), _ALL),)))
    if unexplained(facts, kind_of):
        return found, None
    writes = tuple(p for path in facts.entry for p in _ports(model, path, "out"))
    reads: tuple[Port, ...] = ()
    through: list[str] = []
    for i, kind in enumerate(kind_of):
        own, block = facts.blocks[kind], f"{blocks}.{i}"
        writes += tuple(p for path in own.adders for p in _ports(model, f"{block}.{path}", "out"))
        reads += _reads(model, tuple(f"{block}.{path}" for path in own.readers))
        through += [f"{block}.{path}" for path in own.norms]
    reads += _reads(model, facts.exits)
    size = features(model.get_submodule(facts.entry[0]))[1]
    residual = Link("residual", size, writes, reads, Invariance.PERMUTE | Invariance.ROTATE, (*through, *facts.norms))
    return found, Candidate((None, "residual"), (residual,))


def unexplained(facts: Facts, kind_of: list[int]) -> str:
    """Why the residual stream cannot be followed; "" when it can."""
    return facts.unexplained or next((facts.blocks[k].unexplained for k in kind_of if facts.blocks[k].unexplained), "")
