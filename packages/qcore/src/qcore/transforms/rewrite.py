"""`Rewrite`: a function-preserving change of a model, as data.

A transform fits a rewrite and touches no weight.  One method, `Rewrite.tensor`, applies it, in float64, for streaming, merging and learning alike;
so the trained form is the merged form.  Edits are per parameter and in order; a rewrite can be composed, stored, checked and left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.topology import Invariance, Link, Port
from torch import Tensor, nn


@dataclass(frozen=True)
class Scale:
    """Multiply each channel of the port by `by`.  [C]"""

    port: Port
    by: Tensor

    def apply(self, channels: Tensor) -> Tensor:
        gain = self.port.gain
        return (channels + gain) * self.by.to(channels) - gain


@dataclass(frozen=True)
class Rotate:
    """Mix the channels of the port: c → c·R, block-diagonal with one block for each head.  [h, C/h, C/h]; h = 1 for one head or one shared R"""

    port: Port
    by: Tensor

    def apply(self, channels: Tensor) -> Tensor:
        r = self.by.to(channels)
        c = r.shape[-1]
        split = channels.unflatten(-1, (-1, c))  # [..., heads, c]
        return torch.einsum("...hc,hcd->...hd", split, r.expand(split.shape[-2], c, c)).flatten(-2)


@dataclass(frozen=True)
class Permute:
    """Channel i of the port becomes what channel order[i] was.  [C]"""

    port: Port
    order: Tensor

    def apply(self, channels: Tensor) -> Tensor:
        return channels[..., self.order]


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


Edit = Scale | Rotate | Permute | Shift | Put


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
           "tap:<tensor>": it handles that tap of the module at the path
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
    unties:  parameters that were tied to another and now have a value of their own
    exact:   largest relative deviation of outputs that is claimed; 0 = exact up to rounding
    """

    edits: dict[str, tuple[Edit, ...]] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    inserts: dict[str, Insert] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    unties: frozenset[str] = frozenset()
    exact: float = 0.0

    @property
    def empty(self) -> bool:
        return not (self.edits or self.derived or self.inserts or self.dropped)

    def then(self, later: "Rewrite") -> "Rewrite":
        """First this one, then `later`, which was fitted on the model that this one leaves."""
        edits = dict(self.edits)
        for name, more in later.edits.items():
            edits[name] = edits.get(name, ()) + more
        for new, old in later.derived.items():
            # a parameter derived from one that was edited here starts from the edited form
            edits[new] = tuple(_renamed(e, new) for e in self.edits.get(old, ())) + later.edits.get(new, ())
        derived = self.derived | {new: self.derived.get(old, old) for new, old in later.derived.items()}
        if clash := sorted(set(self.inserts) & set(later.inserts)):
            raise SpecError(
                f"two transforms insert a module at {clash[0]!r} ({self.inserts[clash[0]].module.type}, {later.inserts[clash[0]].module.type}); drop one"
            )
        return Rewrite(
            edits, derived, self.inserts | later.inserts, self.dropped | later.dropped, self.unties | later.unties, max(self.exact, later.exact)
        )

    def source(self, name: str) -> str:
        """The parameter of the original model from which `name` is made."""
        return self.derived.get(name, name)

    def tensor(self, name: str, w: Tensor, module: nn.Module) -> Tensor:
        """The rewritten parameter.

        name:   full name; for derived parameters the new one
        w:      the original parameter `self.source(name)`, any float dtype
        module: the owner of the original parameter, for its layout; its own weights are not looked at
        return: float64 when anything was edited, else `w` itself
        """
        edits = self.edits.get(name, ())
        if not edits:
            return w
        own = self.source(name).rsplit(".", 1)[-1]
        value = w.double()
        for edit in edits:
            value = _apply(edit, value, module, own)
        return value

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-ready data that `from_state` turns back into this rewrite."""
        tensors: dict[str, Tensor] = {}
        edits: dict[str, list[dict[str, Any]]] = {}
        for name, own in self.edits.items():
            rows = []
            for i, edit in enumerate(own):
                value = _payload(edit)
                key = f"{name}#{i}"
                tensors[key] = value.contiguous()
                rows.append({"kind": type(edit).__name__, "port": _port_to_dict(edit.port), "tensor": key})
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
            "unties": sorted(self.unties),
            "exact": self.exact,
        }
        return tensors, data

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> "Rewrite":
        kinds: dict[str, type] = {"Scale": Scale, "Rotate": Rotate, "Permute": Permute, "Shift": Shift, "Put": Put}
        return cls(
            edits={
                name: tuple(kinds[r["kind"]](_port_from_dict(r["port"]), tensors[r["tensor"]]) for r in rows) for name, rows in data["edits"].items()
            },
            derived=dict(data["derived"]),
            inserts={
                path: Insert(ModuleConfig(d["type"], d["config"], {t: tensors[f"{path}!{t}"] for t in d["tensors"]}), d["place"])
                for path, d in data["inserts"].items()
            },
            dropped=frozenset(data["dropped"]),
            unties=frozenset(data["unties"]),
            exact=data["exact"],
        )


def _renamed(edit: Edit, param: str) -> Edit:
    return replace(edit, port=replace(edit.port, param=param))


def _payload(edit: Edit) -> Tensor:
    if isinstance(edit, Put):
        return edit.value
    return edit.order if isinstance(edit, Permute) else edit.by


def _port_to_dict(port: Port) -> dict[str, Any]:
    channels = [[r.start, r.stop] for r in port.channels]
    return {"param": port.param, "axis": port.axis, "part": port.part, "channels": channels, "repeat": port.repeat, "gain": port.gain}


def _port_from_dict(d: Mapping[str, Any]) -> Port:
    return Port(**{**d, "channels": tuple(range(a, b) for a, b in d["channels"])})


def _apply(edit: Edit, value: Tensor, module: nn.Module, own: str) -> Tensor:
    if isinstance(edit, Put):
        return edit.value.double()
    if isinstance(edit, Shift):
        return value + edit.by.double()
    port = edit.port
    if port.part is not None:
        value = value.clone()
        # one part of a fused stack: the same layout, one matrix of it
        whole, back = layout(module, own).channels(value, port.axis)
        whole = whole.clone()
        axis = 0  # parts lie first in every fused stack, whatever the channel axis
        whole.select(axis, port.part).copy_(_on_slices(edit, whole.select(axis, port.part)))
        return back(whole)
    channels, back = layout(module, own).channels(value, port.axis)
    return back(_on_slices(edit, channels))


def _on_slices(edit: Scale | Rotate | Permute, channels: Tensor) -> Tensor:
    slices = edit.port.channels
    if not slices:
        return edit.apply(channels)
    index = torch.cat([torch.arange(r.start, r.stop) for r in slices])
    out = channels.clone()
    out[..., index] = edit.apply(channels[..., index])
    return out


# from a link and a T to edits ------------------------------------------------------------------------------------------------------------


def scale_link(link: Link, t: Tensor) -> Rewrite:
    """Multiply what the link's ports write by `t`, divide where they are read.  t: [C] positive, equal where the link shares scales"""
    return _on_link(
        link,
        Invariance.SCALE,
        lambda port: Scale(port, _repeat(t.double(), link, port)),
        lambda port: Scale(port, _repeat(1 / t.double(), link, port)),
    )


def rotate_link(link: Link, r: Tensor) -> Rewrite:
    """Write c·R, read with Rᵀ.  r: [h, C/heads, C/heads] orthogonal, h = heads of the link, or 1 for the same in every head"""
    r = r.double()
    heads = r.expand(link.heads, *r.shape[-2:]) if r.shape[0] == 1 and link.heads > 1 else r
    # (W x)·R on the writing side is W's out axis times R; on the reading side W·(R·Rᵀ)·x, so W's in axis times R as well
    return _on_link(
        link, Invariance.ROTATE, lambda port: Rotate(port, _repeat_heads(heads, port)), lambda port: Rotate(port, _repeat_heads(heads, port))
    )


def permute_link(link: Link, order: Tensor, norms: Iterable[Port] = ()) -> Rewrite:
    """Channel i becomes what order[i] was, where written and where read, and in the norms between.  order: [C], inside heads"""
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


def _on_link(link: Link, kind: Invariance, write: Any, read: Any) -> Rewrite:
    if kind not in link.invariance:
        raise SpecError(f"link {link.name!r} does not allow {kind.name}: it allows {link.invariance}")
    rewrite = Rewrite()
    for ports, make in ((link.writes, write), (link.reads, read)):
        for port in ports:
            rewrite.edits[port.param] = (*rewrite.edits.get(port.param, ()), make(port))
    return rewrite


def _repeat(t: Tensor, link: Link, port: Port) -> Tensor:
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


class RewrittenReader:
    """A reader whose tensors went through a rewrite: what every step after the transforms reads."""

    def __init__(self, reader: Any, rewrite: Rewrite, model: nn.Module) -> None:
        self._reader, self._rewrite, self._model = reader, rewrite, model

    def names(self) -> Iterable[str]:
        kept = [n for n in self._reader.names() if n not in self._rewrite.dropped]
        return [*kept, *self._rewrite.derived]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._rewrite.source(name) in self._reader and name not in self._rewrite.dropped

    def __getitem__(self, name: str) -> Tensor:
        source = self._rewrite.source(name)
        w = self._reader[source]
        if name not in self._rewrite.edits:
            return w
        owner = self._model.get_submodule(source.rpartition(".")[0])
        return self._rewrite.tensor(name, w, owner)
