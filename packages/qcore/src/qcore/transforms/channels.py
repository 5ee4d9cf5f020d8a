"""Statistics of a link's channels: what the weights on its ports hold, and what was seen at the inputs of those that read it.

Everything comes out as one number per channel of the link: slices are taken, heads that stand several times (grouped-query attention, a
flattened image) are folded together by their maximum.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Seen
from qcore.errors import CalibrationError
from qcore.model.layers import Layout, layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Link, Port, Site
from qcore.numbers import QuantSpec
from qcore.transforms.rewrite import owner_of, scale_classes


def site_of(port: Port) -> Site:
    """The parameter on which the port lies."""
    module, _, own = port.param.rpartition(".")
    return Site(module, own, port.part)


def specs_of(port: Port, specs: Mapping[Site, QuantSpec]) -> dict[Site, QuantSpec]:
    """The sites of the port's parameter that are to be quantized: all of it, parts of it, or slices of its output channels."""
    return {s: spec for s, spec in specs.items() if s.param == port.param and (port.part is None or s.part is None or s.part == port.part)}


def inputs_of(link: Link, specs: Mapping[Site, QuantSpec]) -> dict[Site, Port]:
    """Where to look at the link's channels: the inputs of the weights that read them and are to be quantized, each with its port.

    A fused stack is read by one port, and seen expert by expert.
    """
    return {site.input: port for port in link.reads if port.axis == "in" for site in specs_of(port, specs)}


def seen_at(site: Site, observer: str, seen: Mapping[Site, Seen]) -> Any:
    """What `observer` saw at `site`; CalibrationError where it saw nothing."""
    if site not in seen or observer not in seen[site]:
        raise CalibrationError(
            f"observer {observer!r} saw nothing at {site}; the calibration data never reached it, or the transform did not ask for it"
        )
    return seen[site][observer]


def was_seen(site: Site, observer: str, seen: Mapping[Site, Seen]) -> bool:
    """False for a part of a fused stack that no row reached: the recipe's policy decides about it.  Elsewhere `seen_at` complains."""
    return site.part is None or observer in seen.get(site, {})


def site_matrix(site: Site, w: Tensor, module: nn.Module) -> Tensor:
    """The part of a weight that a site stands for, as a matrix.  [n, K]"""
    matrix = layout(module, site.tensor).matrix(w)
    if site.part is not None:
        matrix = matrix.unflatten(0, (w.shape[0], -1))[site.part]
    return torch.cat([matrix[r.start : r.stop] for r in site.channels]) if site.channels else matrix


def weight_absmax(link: Link, port: Port, reader: TensorReader, model: nn.Module) -> Tensor:
    """The largest magnitude of the port's parameter in each channel of the link.  [C] float64"""
    w = reader[port.param].double()
    return _of_link(link, port, w.abs(), layout(owner_of(model, port.param), site_of(port).tensor))


def input_channels(link: Link, port: Port, columns: Tensor, reader: TensorReader, model: nn.Module) -> Tensor:
    """One number per matrix column → the largest one of each channel of the link.

    columns: [K], or [P, K] with parts, in the order of `Layout.rows`
    return:  [C] float64
    """
    columns = columns.double()
    if port.part is not None:
        return _fold(link, port, _slices(port, columns))
    lay = layout(owner_of(model, port.param), site_of(port).tensor)
    w = reader[port.param]
    n = lay.matrix(w).shape[0]
    rows = columns.reshape(-1, 1, columns.shape[-1]).expand(-1, n // max(1, columns.numel() // columns.shape[-1]), -1).reshape(n, -1)
    return _of_link(link, port, lay.tensor(rows, w.shape), lay)


def share(link: Link, t: Tensor) -> Tensor:
    """The largest of each set of channels that must share one scale, for all of them.  [C]"""
    classes = scale_classes(link)
    return torch.zeros(int(classes.max()) + 1, dtype=t.dtype).scatter_reduce(0, classes, t, "amax", include_self=False)[classes]


def _of_link(link: Link, port: Port, w: Tensor, lay: Layout) -> Tensor:
    channels, _ = lay.channels(w, port.axis)
    if port.part is not None:
        channels = channels[port.part]
    return _fold(link, port, _slices(port, channels.reshape(-1, channels.shape[-1]).amax(0)))


def _slices(port: Port, t: Tensor) -> Tensor:
    return torch.cat([t[r.start : r.stop] for r in port.channels]) if port.channels else t


def _fold(link: Link, port: Port, t: Tensor) -> Tensor:
    return t if port.repeat == 1 else t.unflatten(0, (link.heads, port.repeat, -1)).amax(1).flatten()
