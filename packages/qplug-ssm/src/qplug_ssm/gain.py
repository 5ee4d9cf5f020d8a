"""S1 of MambaQuant: norm gains take the spread of in_proj's columns, after the residual stream was rotated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from qcore.calibration.observer import Observer, Seen
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.channels import weight_absmax
from qcore.transforms.rewrite import Rewrite, scale_link
from torch import Tensor, nn

from qplug_ssm.mambaquant import HIGHEST, LOWEST


@dataclass(frozen=True)
class GainSmooth(Transform):
    """Multiply column j of in_proj by s_j = max|W| / (2·max|W_:,j|), divide the norm's gain (and bias) by it; every column then has the same maximum.

    Needs no data.  It comes last: a norm with unequal gains commutes with no rotation, and `klt` and `hadamard` refuse a stream that passes one.
    Source: https://arxiv.org/abs/2501.13484; S1 of the released code.
    """

    name: ClassVar[str] = "mamba-gain"
    scope: ClassVar[Literal["block", "model"]] = "model"

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for link in _gain_links(topology):
            (port,) = link.reads
            rewrite = rewrite.then(scale_link(link, 1 / equalizing_scales(weight_absmax(link, port, reader, model))))
        if rewrite.empty:
            rewrite.notes = ("mamba-gain: no norm with a gain feeds an in_proj in this model",)
        return rewrite


def _gain_links(topology: Topology) -> list[Link]:
    return [link for link in topology.links_with(Invariance.SCALE) if link.name.endswith(".norm→in_proj")]


def equalizing_scales(maxima: Tensor) -> Tensor:
    """s_j = max / (2·max_j) within [0.01, 100]; 1 for a column of zeros.  maxima: [C] → [C] float64"""
    alive = maxima > 0
    return torch.where(alive, (maxima.max() / (2 * torch.where(alive, maxima, 1.0))).clamp(LOWEST, HIGHEST), 1.0)
