"""SmoothQuant: move the spread of activations into the weights that read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import AbsMax
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.channels import input_channels, inputs_of, seen_at, specs_of, weight_absmax
from qcore.transforms.rewrite import Rewrite, cut_ties, scale_link


def input_links(topology: Topology, specs: Mapping[Site, QuantSpec], names: str = "*") -> tuple[Link, ...]:
    """Scalable links whose channels are the inputs of weights, one of them at least to be quantized.

    names: a shell pattern over link names
    """
    return tuple(
        link
        for link in topology.links_with(Invariance.SCALE)
        if fnmatchcase(link.name, names) and all(p.axis == "in" for p in link.reads) and any(specs_of(p, specs) for p in link.reads)
    )


@dataclass(frozen=True)
class SmoothQuant(Transform):
    """Divide each input channel by s_j = max|X_j|^α / max|W_j|^(1-α), multiply the weights that read it by s_j.

    All readers of a link share one s: max|W_j| is taken over all of them (q, k and v; gate and up).  Channels that never fire, or that nobody
    weighs, keep s = 1; the released code clamps both maxima to 1e-5 instead, which blows such channels up by five orders of magnitude.

    alpha: 0.5 for most models; more moves more of the difficulty into the weights
    links: a shell pattern over link names; the paper smooths "*norm*" alone, this default also value → output and up → down

    Source: https://arxiv.org/abs/2211.10438, equation 4.
    """

    name: ClassVar[str] = "smoothquant"
    alpha: float = 0.5
    links: str = "*"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"alpha lies between 0 (weights decide) and 1 (activations decide), got {self.alpha}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {site: (AbsMax(),) for link in input_links(topology, specs, self.links) for site in inputs_of(link, specs)}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for link in input_links(topology, specs, self.links):
            s = self.scales(link, specs, seen, model, reader)
            rewrite = rewrite.then(scale_link(link, 1 / s))
        return cut_ties(rewrite, model, topology.ties)

    def scales(self, link: Link, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Tensor:
        """s of equation 4.  [C] float64"""
        inputs = [input_channels(link, p, seen_at(site, AbsMax.name, seen), reader, model) for site, p in inputs_of(link, specs).items()]
        x = torch.stack(inputs).amax(0)
        w = torch.stack([weight_absmax(link, p, reader, model) for p in link.reads]).amax(0)
        alive = (x > 0) & (w > 0)
        s = torch.where(alive, x, 1.0) ** self.alpha / torch.where(alive, w, 1.0) ** (1 - self.alpha)
        return torch.where(alive, s.clamp(min=1e-5), 1.0)
