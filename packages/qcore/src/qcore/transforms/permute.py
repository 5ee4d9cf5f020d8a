"""Reorder channels, so that those which share a scale are alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import AbsMax
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.channels import input_channels, inputs_of, seen_at, specs_of, weight_absmax
from qcore.transforms.rewrite import Rewrite, cut_ties, permute_link, through_ports


@dataclass(frozen=True)
class Reorder(Transform):
    """Sort the channels of each link by a key, largest first, inside heads; groups of weights and activations then hold alike channels.

    The order is merged into the weights on both sides, so nothing is gathered at run time; RPTQ, which also clusters, gathers where no link exists.

    by:    "input": largest magnitude seen at the readers' inputs; "weight": largest magnitude of the readers' weights, data-free
    links: a shell pattern over link names

    Source: https://arxiv.org/abs/2304.01089 (RPTQ), section 3.2.
    """

    name: ClassVar[str] = "reorder"
    by: Literal["input", "weight"] = "input"
    links: str = "*"

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        if self.by == "weight":
            return {}
        return {site: (AbsMax(),) for link in self._links(topology, specs) for site in inputs_of(link, specs)}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for link in self._links(topology, specs):
            key = torch.stack(self._keys(link, specs, seen, model, reader)).amax(0)
            rewrite = rewrite.then(permute_link(link, sort_in_heads(key, link.heads), through_ports(link, model)))
        return cut_ties(rewrite, model, topology.ties)

    def _links(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> list[Link]:
        return [
            link
            for link in topology.links_with(Invariance.PERMUTE)
            if fnmatchcase(link.name, self.links) and all(p.axis == "in" for p in link.reads) and any(specs_of(p, specs) for p in link.reads)
        ]

    def _keys(self, link: Link, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> list[Tensor]:
        if self.by == "weight":
            return [weight_absmax(link, port, reader, model) for port in link.reads]
        return [input_channels(link, port, seen_at(site, AbsMax.name, seen), reader, model) for site, port in inputs_of(link, specs).items()]


def sort_in_heads(key: Tensor, heads: int) -> Tensor:
    """The order that sorts `key`, largest first, without leaving a head.  [C] → [C]"""
    inside = key.unflatten(0, (heads, -1)).argsort(dim=1, descending=True, stable=True)
    return (inside + torch.arange(heads).unsqueeze(1) * inside.shape[1]).flatten()
