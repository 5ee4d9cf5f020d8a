"""AWQ's scales: enlarge the weights whose inputs are large, so that rounding hurts them less."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import Gram, Moments
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.topology import Link, Port, Site, Topology
from qcore.numbers import QuantSpec, fake_quantize
from qcore.transforms.base import Transform
from qcore.transforms.benefit import gram_error
from qcore.transforms.channels import input_channels, inputs_of, seen_at, site_matrix, specs_of, was_seen
from qcore.transforms.rewrite import Rewrite, Scale, cut_ties, owner_of, repeat_channels, scale_link
from qcore.transforms.smooth import input_links


@dataclass(frozen=True)
class AWQScale(Transform):
    """Multiply each input channel of the weights by s_j = mean|X_j|^α / √(max s · min s), divide where it is written; α is searched for each link.

    The α of a link is the one with the smallest Σ tr(ΔW G ΔWᵀ) over the weights that read it, ΔW = Q(W∘s)/s - W, rounded to nearest without
    clipping under the weight's own spec.  α = 0 is on the grid, so by its own measure it never hurts.

    Differs from the released code (mit-han-lab/llm-awq), which measures the output of the enclosing module (the whole attention for q, k and v) on
    samples, and searches clipping afterwards: here the outputs of the weights themselves are measured, from their Gram matrix; clipping is a
    solver's business.  Value → output is scaled with grouped-query attention too, where the released code leaves it out.  Do not use it after a
    Hadamard rotation, which removes the very differences between channels that it lives on.

    grid:  number of α, from 0 to 1 - 1/grid
    links: a shell pattern over link names

    Source: https://arxiv.org/abs/2306.00978, equations 4 and 5.
    """

    name: ClassVar[str] = "awq"
    grid: int = 20
    links: str = "*"

    def __post_init__(self) -> None:
        if self.grid < 2:
            raise SpecError(f"the grid has at least 2 values of alpha, got {self.grid}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {site: (Moments(), Gram()) for link in input_links(topology, specs, self.links) for site in inputs_of(link, specs)}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for link in input_links(topology, specs, self.links):
            s = self.search(link, specs, seen, model, reader)
            if bool((s != 1).any()):
                rewrite = rewrite.then(scale_link(link, 1 / s))
        return cut_ties(rewrite, model, topology.ties)

    def search(self, link: Link, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Tensor:
        """The s of the best α; 1 where nothing was seen, which only an expert may.  [C] float64"""
        inputs = [
            input_channels(link, replace(p, part=site.part), seen_at(site, Moments.name, seen).mean_abs, reader, model)
            for site, p in inputs_of(link, specs).items()
            if was_seen(site, Moments.name, seen)
        ]
        if not inputs:
            return torch.ones(link.size, dtype=torch.float64)
        mean = torch.stack(inputs).mean(0)
        readers = [
            _Reader(link, p, site, spec, seen, model, reader)
            for p in link.reads
            for site, spec in specs_of(p, specs).items()
            if was_seen(site.input, Gram.name, seen)
        ]
        best, least = torch.ones_like(mean), float("inf")
        for step in range(self.grid):
            s = (mean ** (step / self.grid)).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            error = sum(r.error(s) for r in readers)
            if error < least:
                best, least = s, error
        return best


class _Reader:
    """A weight that reads the link's channels, and what rounding it costs."""

    def __init__(
        self, link: Link, port: Port, site: Site, spec: QuantSpec, seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader
    ) -> None:
        self.link, self.port, self.site, self.spec = link, port, site, spec
        self.owner = owner_of(model, port.param)
        self.gram = seen_at(site.input, Gram.name, seen)
        w = reader[port.param]
        if site.part is not None:
            # one expert, as a stack of its own: the search would spread a scale over all of them at every step
            w = w[site.part : site.part + 1]
            self.site, self.port = replace(site, part=0), replace(port, part=None)
        w = w.float()
        self.ones = torch.ones_like(w)
        self.matrix = site_matrix(self.site, w, self.owner)

    def error(self, s: Tensor) -> float:
        edit = Scale(self.port, repeat_channels(s, self.link, self.port))
        spread = Rewrite(edits={self.port.param: (edit,)}).tensor(self.port.param, self.ones, self.owner)
        factors = site_matrix(self.site, spread, self.owner).float()
        return gram_error(fake_quantize(self.matrix * factors, self.spec) / factors - self.matrix, self.gram)
