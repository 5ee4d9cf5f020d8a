"""Cross-layer equalization: give both sides of a link the same range in every channel, without data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Port, Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.channels import share, weight_absmax
from qcore.transforms.rewrite import Rewrite, RewrittenReader, cut_ties, scale_link


@dataclass(frozen=True)
class CrossLayerEqualize(Transform):
    """Divide each written channel by s = √(r1 / r2), multiply it where it is read, so that both weights' ranges become √(r1·r2).

    A layer is written by one link and read by another, so links are swept again and again until no scale moves.  Links that only vectors write
    (a norm's gain, a batch norm that is not folded) have no weight to equalize with, and are left alone and noted.

    sweeps:    at most so many passes over all links
    tolerance: stop when no scale of a pass differs from 1 by more

    Source: https://arxiv.org/abs/1906.04721 (Nagel et al. 2019), equation 11.  Biases are scaled, not absorbed (section 4.1.3 is left out).
    """

    name: ClassVar[str] = "equalize"
    sweeps: int = 20
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise SpecError(f"at least 1 sweep is needed, got {self.sweeps}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        links, notes = [], []
        for link in topology.links_with(Invariance.SCALE):
            if any(reader[p.param].ndim > 1 for p in link.writes):
                links.append(link)
            else:
                notes.append(f"{link.name}: only vectors write it (an unfolded norm); not equalized")
        total = {link.name: torch.ones(link.size, dtype=torch.float64) for link in links}
        for _ in range(self.sweeps):
            moved = 0.0
            for link in links:
                now = RewrittenReader(reader, _all(links, total), model)
                s = _balance(link, now, model)
                total[link.name] = total[link.name] / s
                moved = max(moved, float((s - 1).abs().max()))
            if moved <= self.tolerance:
                break
        rewrite = _all(links, total)
        rewrite.notes = tuple(notes)
        return cut_ties(rewrite, model, topology.ties)


def _all(links: list[Link], total: Mapping[str, Tensor]) -> Rewrite:
    rewrite = Rewrite()
    for link in links:
        rewrite = rewrite.then(scale_link(link, total[link.name]))
    return rewrite


def _balance(link: Link, reader: TensorReader, model: nn.Module) -> Tensor:
    """s = √(r1 / r2), 1 where either side is all zeros.  [C]"""

    def ranges(ports: tuple[Port, ...]) -> Tensor:
        return share(link, torch.stack([weight_absmax(link, p, reader, model) for p in ports if reader[p.param].ndim > 1]).amax(0))

    r1, r2 = ranges(link.writes), ranges(link.reads)
    alive = (r1 > 0) & (r2 > 0)
    return torch.where(alive, (torch.where(alive, r1, 1.0) / torch.where(alive, r2, 1.0)).sqrt(), 1.0)
