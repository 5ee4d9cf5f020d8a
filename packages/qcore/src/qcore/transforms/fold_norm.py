"""Fold the gains of norms into the weights that read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Port, Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Edit, Put, Rewrite, Scale, Shift, cut_ties, owner_of, repeat_channels


@dataclass(frozen=True)
class FoldNorm(Transform):
    """Norm gains become 1, the weights that read them take the gains over; a norm's bias goes into the readers' biases: W(g∘n + b) = (W∘g)n + Wb.

    What a rotation of the residual stream needs first: only a norm without gain commutes with it.  Norms are found as links whose writes are vectors
    of one module.  Where a reader has no bias, the norm keeps its own, divided by the gain.  Folding the last norm into a tied head unties it.

    A gain that is zero or negative is folded only where nothing but the norm stands between (a link names it in `through`): elsewhere an
    activation may, and only positive factors pass one.  What is left alone is named in the rewrite's notes.

    Source: https://arxiv.org/abs/2404.00456 (QuaRot), section 4, stage 1a.
    """

    name: ClassVar[str] = "fold-norm"
    scope: ClassVar[Literal["block", "model"]] = "model"

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        edits: dict[str, tuple[Edit, ...]] = {}
        notes: list[str] = []
        for link, path in norm_links(topology):
            direct = any(path in other.through and set(link.reads) <= set(other.reads) for other in topology.links)
            for param, edit in _fold(link, direct, model, reader, notes).items():
                if param in edits and any(param == p.param for p in link.writes):
                    raise SpecError(
                        f"{param} writes two links, {link.name!r} among them; the adapter must give one norm one link with all its readers"
                    )
                edits[param] = edits.get(param, ()) + edit
        return cut_ties(Rewrite(edits=edits, notes=tuple(notes)), model, topology.ties)


def norm_links(topology: Topology) -> list[tuple[Link, str]]:
    """Links whose writes are a `weight` vector and perhaps a `bias` of one module, with that module's path."""
    matrices = {port.param for link in topology.links for port in link.ports if port.axis == "in"} | {s.param for s in topology.sites}
    found = []
    for link in topology.links:
        modules = {port.param.rpartition(".")[0] for port in link.writes}
        vectors = all(port.param.rpartition(".")[2] in ("weight", "bias") and port.param not in matrices for port in link.writes)
        # only a norm writes no matrix: the weight of a layer is read or quantized somewhere
        if len(modules) == 1 and vectors and Invariance.SCALE in link.invariance and all(p.axis == "in" for p in link.reads):
            found.append((link, modules.pop()))
    return found


def _fold(link: Link, direct: bool, model: nn.Module, reader: TensorReader, notes: list[str]) -> dict[str, tuple[Edit, ...]]:
    """The edits of one norm and its readers; {} and a note where it must be left alone."""
    ports = {port.param.rpartition(".")[2]: port for port in link.writes}
    if "weight" not in ports or reader[ports["weight"].param].ndim != 1:
        return {}
    weight = reader[ports["weight"].param].double()
    gain = weight + ports["weight"].gain
    if not direct and bool((gain <= 0).any()):
        notes.append(f"{link.name}: a gain is not positive, and something may stand between the norm and its readers; its gain is left alone")
        return {}
    if bool((gain == 1).all()) and "bias" not in ports:
        return {}
    edits: dict[str, tuple[Edit, ...]] = {}
    if "bias" in ports:
        bias = reader[ports["bias"].param].double()
        reasons = [why for port in link.reads if (why := _no_bias(port, model, reader))] or ([] if direct else ["something may stand between"])
        if not reasons:
            for port in link.reads:
                name = _bias_name(port)
                edits[name] = (
                    *edits.get(name, ()),
                    Shift(Port(name, "out"), _through(port, reader[port.param].double(), repeat_channels(bias, link, port), model)),
                )
            edits[ports["bias"].param] = (Put(ports["bias"], torch.zeros_like(bias)),)
        elif bool(((gain == 0) & (bias != 0)).any()):
            notes.append(f"{link.name}: the norm's bias must stay ({reasons[0]}), and it cannot be divided by a gain that is zero; left alone")
            return {}
        else:
            if bool((bias != 0).any()):
                notes.append(f"{link.name}: the norm keeps its bias: {reasons[0]}")
            edits[ports["bias"].param] = (Put(ports["bias"], torch.where(gain == 0, 0.0, bias / gain)),)
    edits[ports["weight"].param] = (Put(ports["weight"], torch.full_like(weight, 1 - ports["weight"].gain)),)
    for port in link.reads:
        edits[port.param] = (*edits.get(port.param, ()), Scale(port, repeat_channels(gain, link, port)))
    return edits


def _bias_name(port: Port) -> str:
    return port.param.rpartition(".")[0] + ".bias"


def _no_bias(port: Port, model: nn.Module, reader: TensorReader) -> str | None:
    """Why the norm's bias cannot go into this reader, or None."""
    if port.param.rpartition(".")[2] != "weight" or port.part is not None or port.channels:
        return f"{port} is a slice of its module"
    if _bias_name(port) not in reader:
        return f"{port.param.rpartition('.')[0]} has no bias"
    module = owner_of(model, port.param)
    if not isinstance(module, nn.Linear) and layout(module).parts != 1:
        return f"{port.param} is grouped"
    if isinstance(module, nn.modules.conv._ConvNd) and any(any(p) for p in _paddings(module)):
        # padding is zero after the norm's bias, not before it
        return f"{port.param.rpartition('.')[0]} pads its input"
    return None


def _paddings(module: nn.modules.conv._ConvNd) -> tuple[tuple[int, ...], ...]:
    return ((1,),) if module.padding == "same" else tuple((int(p),) for p in module.padding if not isinstance(p, str))


def _through(port: Port, w: Tensor, bias: Tensor, model: nn.Module) -> Tensor:
    """W·b: what a constant on the reader's input adds to its output.  [N]"""
    channels, _ = layout(owner_of(model, port.param)).channels(w, port.axis)  # [N, …, C]
    return (channels @ bias).reshape(channels.shape[0], -1).sum(1)
