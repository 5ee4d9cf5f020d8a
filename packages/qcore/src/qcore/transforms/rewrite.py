"""`Rewrite`: a function-preserving change of a model, as data.

A transform fits a rewrite and touches no weight.  One method, `Rewrite.tensor`, applies it, in float64, for streaming, merging and learning alike;
so the trained form is the merged form.  Edits are per parameter and in order; a rewrite can be composed, stored, checked and left out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.errors import NotFound, SpecError
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Port, Site, Topology
from qcore.modules.leaves import FLOAT_LEAVES
from qcore.modules.online import Online
from qcore.numbers import hadamard as hadamards


@dataclass(frozen=True)
class Scale:
    """Multiply each channel of the port by `by`.  [C]; zeros are allowed where a split leaves channels out"""

    port: Port
    by: Tensor

    def apply(self, channels: Tensor) -> Tensor:
        gain = self.port.gain
        return (channels + gain) * self.by.to(channels) - gain

    def undo(self, channels: Tensor) -> Tensor:
        return replace(self, by=1 / self.by).apply(channels)


@dataclass(frozen=True)
class Rotate:
    """Mix the channels of the port: c → c·R, block-diagonal with one block for each head.  [h, c, c]; h = 1: the same R in every head"""

    port: Port
    by: Tensor

    def apply(self, channels: Tensor) -> Tensor:
        r = self.by.to(channels)
        split = channels.unflatten(-1, (-1, r.shape[-2]))  # [..., heads, c]
        return torch.einsum("...hc,hcd->...hd", split, r.expand(split.shape[-2], *r.shape[-2:])).flatten(-2)

    def undo(self, channels: Tensor) -> Tensor:
        return replace(self, by=self.by.transpose(-1, -2)).apply(channels)


@dataclass(frozen=True)
class Hadamard:
    """Rotate by R = diag(signs)·Hᵀ without ever making R: c → (c ∘ signs)·Hᵀ, block-diagonal, in O(n log n).

    signs: [P] of ±1, P ≥ C: channels beyond C are zeros that are appended first, so that the axis grows to P
    block: size of each H; divides P
    """

    port: Port
    signs: Tensor
    block: int

    def apply(self, channels: Tensor) -> Tensor:
        signed = F.pad(channels, (0, self.signs.shape[0] - channels.shape[-1])) * self.signs.to(channels)
        return hadamards.transform(signed.unflatten(-1, (-1, self.block))).flatten(-2)

    def undo(self, channels: Tensor) -> Tensor:
        """The inverse on the grown axis; the appended channels are not taken away, they come out as zeros."""
        blocks = channels.unflatten(-1, (-1, self.block)) @ hadamards.hadamard(self.block).to(channels)
        return blocks.flatten(-2) * self.signs.to(channels)


@dataclass(frozen=True)
class Permute:
    """Channel i of the port becomes what channel order[i] was.  [C]; a shorter order keeps only the channels that it names, in a derived parameter"""

    port: Port
    order: Tensor

    def apply(self, channels: Tensor) -> Tensor:
        return channels[..., self.order]

    def undo(self, channels: Tensor) -> Tensor:
        return channels[..., self.order.argsort()]


@dataclass(frozen=True)
class Shift:
    """Add `by`, of the parameter's own shape: the fine part of a split, a folded mean."""

    port: Port
    by: Tensor


@dataclass(frozen=True)
class Put:
    """Replace the parameter by `value`, of any shape: the coarse part of a split, a bias that there was not."""

    port: Port
    value: Tensor


Edit = Scale | Rotate | Hadamard | Permute | Shift | Put


FLOAT_LEAF_NAMES = frozenset(leaf.name for leaf in FLOAT_LEAVES)


@dataclass(frozen=True)
class ModuleConfig:
    """A module to insert: its registered name, its plain-data config, and tensors for its buffers."""

    type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Insert:
    """Where a run-time module goes.

    place: "before": it transforms the input of the leaf at the path (an online rotation);
           "instead": it takes the place of the module at the path (S-SiLU, a sum of two leaves whose parameters are derived from the one's);
           "tap:<tensor>": it handles that tap of the module at the path; "tap:q,k": each of these taps has one of its own
    """

    module: ModuleConfig
    place: str = "before"


@dataclass
class Rewrite:
    """Edits by parameter, new parameters derived from old ones, modules to insert, and ties that it cuts.

    edits:   parameter → edits on ports of it, in order
    derived: new parameter → the parameter from which it starts (its own edits follow under its own name)
    inserts: module path → Insert
    dropped: parameters that are there no more
    heirs:   dropped parameter → the one that now writes its channels: a batch norm's gain → the weight of the layer before
    unties:  parameters that were tied to another and now have a value of their own
    exact:   largest relative deviation of outputs that is claimed; 0 = exact up to rounding
    notes:   what was left out, and why; one sentence each, for the plan and the journal
    """

    edits: dict[str, tuple[Edit, ...]] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    inserts: dict[str, Insert] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    heirs: dict[str, str] = field(default_factory=dict)
    unties: frozenset[str] = frozenset()
    exact: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.edits or self.derived or self.inserts or self.dropped)

    def then(self, later: "Rewrite") -> "Rewrite":
        """First this one, then `later`, which was fitted on the model that this one leaves."""
        if gone := sorted(self.dropped & set(later.edits)):
            raise SpecError(f"a later transform edits {gone[0]!r}, which an earlier one took away; put the one that splits leaves last")
        if behind := sorted(p.param for p in _ports_of(later) if p.axis == "in" and _leaf_of(p.param) in self._fronted):
            raise SpecError(
                f"a later transform edits the inputs of {behind[0]!r}, before which an earlier one put a module: they are no longer the channels of "
                "any link; put the one that inserts last, or fit on `rewritten_topology`"
            )
        edits = dict(self.edits)
        for name, more in later.edits.items():
            edits[name] = edits.get(name, ()) + more
        derived = dict(self.derived)
        for new, old in later.derived.items():
            if new in later.unties:
                # it had a name of its own before, and what was done to it stands under that name
                derived.setdefault(new, old)
            else:
                # a parameter derived from one that was edited here starts from the edited form
                edits[new] = tuple(_renamed(e, new) for e in self.edits.get(old, ())) + later.edits.get(new, ())
                derived[new] = self.derived.get(old, old)
        # a layer of ours that stands for another one may be split, or replaced, like any layer
        leaves = {path for path, own in self.inserts.items() if own.place == "instead" and own.module.type in FLOAT_LEAF_NAMES}
        replaced = {path for path, own in later.inserts.items() if path in leaves and own.place == "instead"}
        if clash := sorted((set(self.inserts) & set(later.inserts)) - replaced):
            one, other = self.inserts[clash[0]].module.type, later.inserts[clash[0]].module.type
            raise SpecError(f"two transforms insert a module at {clash[0]!r} ({one}, {other}); drop one")
        return Rewrite(
            edits={name: own for name, own in edits.items() if name not in later.dropped},
            derived=derived,
            inserts=self.inserts | later.inserts,
            dropped=self.dropped | later.dropped,
            heirs=self.heirs | later.heirs,
            unties=self.unties | later.unties,
            exact=max(self.exact, later.exact),
            notes=self.notes + later.notes,
        )

    @property
    def _fronted(self) -> frozenset[str]:
        """Leaves that have a module before them."""
        return frozenset(path for path, insert in self.inserts.items() if insert.place == "before")

    def source(self, name: str) -> str:
        """The parameter of the original model from which `name` is made."""
        return self.derived.get(name, name)

    def tensor(self, name: str, w: Tensor, module: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
        """The rewritten parameter.

        name:   full name; for derived parameters the new one
        w:      the original parameter `self.source(name)`, any float dtype
        module: the owner of the parameter (`owner_of`), for its layout; its own weights are not looked at
        dtype:  what it is computed in; learners take float32, all that is stored takes the default
        return: of that dtype when anything was edited, else `w` itself
        """
        edits = self.edits.get(name, ())
        if not edits:
            return w
        own = self._own(name, module)
        value = _own_copy(w, dtype)
        for edit in edits:
            value = _apply(edit, value, module, own)
        return value

    def undo(self, name: str, w: Tensor, module: nn.Module) -> Tensor:
        """The inverse of `tensor`: where a rewritten (and perhaps rounded) parameter lies in the original model's channels.  float64

        SpecError where an edit put a value in the parameter's place: that has no inverse.
        """
        own = self._own(name, module)
        value = _own_copy(w, torch.float64)
        for edit in reversed(self.edits.get(name, ())):
            if isinstance(edit, Put):
                raise SpecError(f"{name} was replaced as a whole; there is no way back to the original")
            value = value - edit.by.double() if isinstance(edit, Shift) else _on_channels(edit, value, module, own, edit.undo)
        return value

    def _own(self, name: str, module: nn.Module) -> str:
        """The parameter's name inside `module`: a derived parameter may be called otherwise than the one it starts from."""
        own = name.rsplit(".", 1)[-1]
        return own if getattr(module, own, None) is not None else self.source(name).rsplit(".", 1)[-1]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-ready data that `from_state` turns back into this rewrite."""
        tensors: dict[str, Tensor] = {}
        keys: dict[int, str] = {}  # one rotation is shared by hundreds of edits: it is stored once
        edits: dict[str, list[dict[str, Any]]] = {}
        for name, own in self.edits.items():
            rows = []
            for i, edit in enumerate(own):
                value = _payload(edit)
                key = keys.setdefault(id(value), f"{name}#{i}")
                tensors[key] = value.contiguous()
                row = {"kind": type(edit).__name__, "port": _port_to_dict(edit.port), "tensor": key}
                rows.append(row | ({"block": edit.block} if isinstance(edit, Hadamard) else {}))
            edits[name] = rows
        inserts = {}
        for path, insert in self.inserts.items():
            for part, t in insert.module.tensors.items():
                tensors[f"{path}!{part}"] = t.contiguous()
            inserts[path] = {
                "place": insert.place,
                "type": insert.module.type,
                "config": dict(insert.module.config),
                "tensors": sorted(insert.module.tensors),
            }
        data = {
            "edits": edits,
            "derived": self.derived,
            "inserts": inserts,
            "dropped": sorted(self.dropped),
            "heirs": self.heirs,
            "unties": sorted(self.unties),
            "exact": self.exact,
            "notes": list(self.notes),
        }
        return tensors, data

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> "Rewrite":
        return cls(
            edits={name: tuple(_edit_from(row, tensors) for row in rows) for name, rows in data["edits"].items()},
            derived=dict(data["derived"]),
            inserts={
                path: Insert(ModuleConfig(d["type"], d["config"], {t: tensors[f"{path}!{t}"] for t in d["tensors"]}), d["place"])
                for path, d in data["inserts"].items()
            },
            dropped=frozenset(data["dropped"]),
            heirs=dict(data.get("heirs", {})),
            unties=frozenset(data["unties"]),
            exact=data["exact"],
            notes=tuple(data["notes"]),
        )


def _leaf_of(param: str) -> str:
    return param.rpartition(".")[0]


def _ports_of(rewrite: Rewrite) -> list[Port]:
    return [edit.port for edits in rewrite.edits.values() for edit in edits]


_KINDS: dict[str, type] = {c.__name__: c for c in (Scale, Rotate, Hadamard, Permute, Shift, Put)}


def _edit_from(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    more = (row["block"],) if "block" in row else ()
    return _KINDS[row["kind"]](_port_from_dict(row["port"]), tensors[row["tensor"]], *more)


def _renamed(edit: Edit, param: str) -> Edit:
    return replace(edit, port=replace(edit.port, param=param))


def _payload(edit: Edit) -> Tensor:
    match edit:
        case Put():
            return edit.value
        case Permute():
            return edit.order
        case Hadamard():
            return edit.signs
    return edit.by


def _port_to_dict(port: Port) -> dict[str, Any]:
    channels = [[r.start, r.stop] for r in port.channels]
    return {"param": port.param, "axis": port.axis, "part": port.part, "channels": channels, "repeat": port.repeat, "gain": port.gain}


def _port_from_dict(d: Mapping[str, Any]) -> Port:
    return Port(**{**d, "channels": tuple(range(a, b) for a, b in d["channels"])})


def _apply(edit: Edit, value: Tensor, module: nn.Module, own: str) -> Tensor:
    if isinstance(edit, Put):
        return edit.value.to(value.dtype)
    if isinstance(edit, Shift):
        return value + edit.by.to(value.dtype)
    return _on_channels(edit, value, module, own, edit.apply)


def _on_channels(edit: Edit, value: Tensor, module: nn.Module, own: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    port = edit.port
    channels, back = layout(module, own).channels(value, port.axis)
    if port.part is None:
        return back(_on_slices(port, channels, change))
    # parts lie first in every fused stack, whatever the channel axis; `channels` is a view of `value`, which nobody else holds: a copy of the
    # stack for each of its parts would cost the square of their number
    changed = _on_slices(port, channels[port.part], change)
    if changed.shape == channels.shape[1:]:
        channels[port.part] = changed
        return back(channels)
    raise SpecError(f"{port}: one part of a stack cannot change its size; the others keep theirs")


def _own_copy(w: Tensor, dtype: torch.dtype) -> Tensor:
    """`w` in this dtype, in memory of its own."""
    return w.to(dtype, copy=True)


def _on_slices(port: Port, channels: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if not port.channels:
        return change(channels)
    index = torch.cat([torch.arange(r.start, r.stop) for r in port.channels])
    out = channels.clone()
    out[..., index] = change(channels[..., index])
    return out


# from a link and a T to edits ------------------------------------------------------------------------------------------------------------


def scale_link(link: Link, t: Tensor) -> Rewrite:
    """Multiply what the link's ports write by `t`, divide where they are read.  t: [C] positive, equal where the link shares scales"""
    return _on_link(
        link,
        Invariance.SCALE,
        lambda port: Scale(port, repeat_channels(t.double(), link, port)),
        lambda port: Scale(port, repeat_channels(1 / t.double(), link, port)),
    )


def rotate_link(link: Link, r: Tensor) -> Rewrite:
    """Write c·R, read with Rᵀ.  r: [h, C/heads, C/heads] orthogonal, h = heads of the link, or 1 for the same in every head"""
    r = r.double()
    heads = r.expand(link.heads, *r.shape[-2:]) if r.shape[0] == 1 and link.heads > 1 else r
    # (W x)·R on the writing side is W's out axis times R; on the reading side W·(R·Rᵀ)·x, so W's in axis times R as well
    return _on_link(
        link, Invariance.ROTATE, lambda port: Rotate(port, _repeat_heads(heads, port)), lambda port: Rotate(port, _repeat_heads(heads, port))
    )


def hadamard_link(link: Link, signs: Tensor, block: int) -> Rewrite:
    """`rotate_link` with R = diag(signs)·Hᵀ in blocks of `block`.  signs: [C]; a block lies inside one head"""
    if link.size // link.heads % block:
        raise SpecError(
            f"link {link.name!r} has {link.heads} heads of {link.size // link.heads} channels; Hadamard blocks of {block} do not divide them"
        )
    own = {repeat: repeat_channels(signs.double(), link, Port("", "in", repeat=repeat)) for repeat in {p.repeat for p in link.ports}}
    return _on_link(
        link, Invariance.ROTATE, lambda port: Hadamard(port, own[port.repeat], block), lambda port: Hadamard(port, own[port.repeat], block)
    )


def permute_link(link: Link, order: Tensor, norms: Iterable[Port] = ()) -> Rewrite:
    """Channel i becomes what order[i] was, where written and where read, and in the norms between.

    order: [C], inside heads
    norms: `through_ports(link, model)`
    """
    order = order.long()
    rewrite = _on_link(
        link,
        Invariance.PERMUTE,
        lambda port: Permute(port, _repeat_order(order, link, port)),
        lambda port: Permute(port, _repeat_order(order, link, port)),
    )
    for port in norms:
        rewrite.edits[port.param] = (*rewrite.edits.get(port.param, ()), Permute(port, order))
    return rewrite


def through_ports(link: Link, model: nn.Module) -> tuple[Port, ...]:
    """The gains and biases of the modules that the link passes: they move with a permutation."""
    ports = []
    for path in link.through:
        module = model.get_submodule(path)
        vectors = [n for n, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)] if t.shape == (link.size,)]
        ports += [Port(f"{path}.{name}", "out") for name in vectors]
    return tuple(ports)


def scale_classes(link: Link) -> Tensor:
    """Which channels must share one scale: equal numbers share.  [C], numbers from 0 upwards

    RoPE turns channel i together with i + rotary/2 ("half") or 2i with 2i + 1 ("interleaved"); a free scale for each would not commute with it.
    """
    size = link.size // link.heads
    rotary = link.rotary_dims or size
    index = torch.arange(size)
    if link.share == "half":
        index = torch.where(index < rotary, index % (rotary // 2), index)
    elif link.share == "interleaved":
        index = torch.where(index < rotary, index // 2, index)
    heads = torch.arange(link.heads).unsqueeze(1) * size + index
    return heads.flatten().unique(return_inverse=True)[1]


def _on_link(link: Link, kind: Invariance, write: Any, read: Any) -> Rewrite:
    if kind not in link.invariance:
        raise SpecError(f"link {link.name!r} does not allow {kind.name}: it allows {link.invariance}")
    rewrite = Rewrite()
    for ports, make in ((link.writes, write), (link.reads, read)):
        for port in ports:
            rewrite.edits[port.param] = (*rewrite.edits.get(port.param, ()), make(port))
    return rewrite


def repeat_channels(t: Tensor, link: Link, port: Port) -> Tensor:
    """Each head's channels `port.repeat` times in a row.  [C] → [C·repeat]"""
    return t if port.repeat == 1 else t.unflatten(0, (link.heads, -1)).repeat_interleave(port.repeat, 0).flatten()


def _repeat_heads(r: Tensor, port: Port) -> Tensor:
    return r if port.repeat == 1 else r.repeat_interleave(port.repeat, 0)


def _repeat_order(order: Tensor, link: Link, port: Port) -> Tensor:
    if port.repeat == 1:
        return order
    size = link.size // link.heads
    heads = order.unflatten(0, (link.heads, size))
    inside = heads - torch.arange(link.heads).unsqueeze(1) * size  # a permutation inside each head
    many = inside.repeat_interleave(port.repeat, 0)
    return (many + torch.arange(many.shape[0]).unsqueeze(1) * size).flatten()


# ties, owners, sites ---------------------------------------------------------------------------------------------------------------------


class Owners(Protocol):
    """Modules by path: a model, or whoever remembers those that something else has replaced."""

    def get_submodule(self, target: str, /) -> nn.Module: ...


def owner_of(model: Owners, name: str, source: str = "") -> nn.Module:
    """The module whose layout the parameter has: its own where there is one, else the leaf that it was split from, else that of `source`."""
    path, _, own = name.rpartition(".")
    while path:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = None
        module = module.leaf if isinstance(module, Online) else module
        if module is not None and getattr(module, own, None) is not None:
            return module
        path = path.rpartition(".")[0]
    if isinstance(model, nn.Module) and getattr(model, name, None) is not None:
        return model
    return model.get_submodule((source or name).rpartition(".")[0])


def cut_ties(rewrite: Rewrite, model: nn.Module, ties: Mapping[str, str]) -> Rewrite:
    """Give every tied parameter that changes otherwise than its partner a value of its own; the others stay tied.

    ties: `Topology.ties`.  A rotation of the residual stream treats embedding and head alike, a folded norm only the head.
    """
    cut = {name: first for name, first in ties.items() if not _treated_alike(rewrite, model, name, first)}
    return replace(rewrite, derived=cut | rewrite.derived, unties=rewrite.unties | cut.keys())


def _treated_alike(rewrite: Rewrite, model: nn.Module, a: str, b: str) -> bool:
    """Whether the edits do the same to both tensors, whatever their owners call the axes."""
    one, other = rewrite.edits.get(a, ()), rewrite.edits.get(b, ())
    return len(one) == len(other) and all(
        _without_names(x, model, a) == _without_names(y, model, b) and torch.equal(_payload(x), _payload(y)) for x, y in zip(one, other, strict=True)
    )


def _without_names(edit: Edit, model: nn.Module, name: str) -> tuple[Any, ...]:
    module, own = owner_of(model, name), name.rsplit(".", 1)[-1]
    probe = torch.empty(tuple(range(2, 2 + getattr(module, own).ndim)), device="meta")  # sizes tell the axes apart
    size = layout(module, own).channels(probe, edit.port.axis)[0].shape[-1]
    return type(edit), size, replace(edit.port, param="", axis="in")


def rewritten_topology(topology: Topology, rewrite: Rewrite) -> Topology:
    """The places after the rewrite, for the transforms that follow.

    A site that was split is followed by the sites of its parts, and no link touches it any more.  A leaf with a module before it reads no link.
    """
    parts = {}
    for old in rewrite.dropped:
        module, _, own = old.rpartition(".")
        parts[old] = [new for new in rewrite.derived if new.startswith(f"{module}.") and new.endswith(f".{own}")]

    def places(site: Site) -> tuple[Site, ...]:
        if site.param not in parts:
            return (site,)
        return tuple(replace(site, module=new.rpartition(".")[0]) for new in parts[site.param])

    blocks = tuple(
        replace(block, stages=tuple(tuple(part for site in stage for part in places(site)) for stage in block.stages)) for block in topology.blocks
    )
    links = tuple(_inherited(link, rewrite) for link in topology.links) if rewrite.heirs else topology.links
    gone = {
        link: f"link {link.name} reads a leaf that was split, or that has a module before it"
        for link in links
        if any(p.param in rewrite.dropped for p in link.ports) or any(p.axis == "in" and _leaf_of(p.param) in rewrite._fronted for p in link.reads)
    }
    kept = tuple(link for link in links if link not in gone)
    blocked = {p: why for link, why in gone.items() for p in link.ports if p.param not in rewrite.dropped}
    ties = {name: first for name, first in topology.ties.items() if name not in rewrite.unties}
    return replace(topology, blocks=blocks, links=kept, blocked={**topology.blocked, **blocked}, ties=ties)


def _inherited(link: Link, rewrite: Rewrite) -> Link:
    """The link with the heirs of dropped parameters in their place; those without an heir (a batch norm's mean) are left out."""
    if not any(port.param in rewrite.heirs or _has_heir(port.param, rewrite) for port in link.writes):
        return link
    ports = [
        replace(p, param=rewrite.heirs.get(p.param, p.param)) for p in link.writes if p.param in rewrite.heirs or not _has_heir(p.param, rewrite)
    ]
    return replace(link, writes=tuple(dict.fromkeys(ports)))


def _has_heir(param: str, rewrite: Rewrite) -> bool:
    """Whether the dropped parameter's module handed its work over."""
    return param in rewrite.dropped and any(_leaf_of(param) == _leaf_of(old) for old in rewrite.heirs)


class RewrittenReader:
    """A reader whose tensors went through a rewrite: what every step after the transforms reads."""

    def __init__(self, reader: TensorReader, rewrite: Rewrite, model: Owners) -> None:
        self._reader, self._rewrite, self._model = reader, rewrite, model

    def names(self) -> Iterable[str]:
        kept = [n for n in self._reader.names() if n not in self._rewrite.dropped]
        return dict.fromkeys([*kept, *self._rewrite.derived])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._rewrite.source(name) in self._reader and name not in self._rewrite.dropped

    def __getitem__(self, name: str) -> Tensor:
        if name in self._rewrite.dropped:
            raise NotFound(f"{name!r} is no more: a transform split its module")
        source = self._rewrite.source(name)
        w = self._reader[source]
        if name not in self._rewrite.edits:
            return w
        return self._rewrite.tensor(name, w, owner_of(self._model, name, source))
