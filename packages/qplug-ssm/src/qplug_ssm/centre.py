"""Subtract the mean of δ between x_proj and dt_proj, and let dt_proj's bias take it back: MambaQuant's reduce-mean.

A tensor that lies around zero fills a symmetric grid better.  dt_proj's bias takes W_dt·m, with the float weight: what rounding does to W_dt no
longer touches the mean.  Where x_proj has a bias, its δ part takes -m and nothing is computed at run time.  Where it has none, or a norm stands
between, `SubtractMean` stands before dt_proj.  A bias that x_proj did not have would cost as much, and scalings and rotations that come later do
not know it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import Moments
from qcore.model.reader import TensorReader
from qcore.model.topology import Port, Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.channels import seen_at
from qcore.transforms.rewrite import Edit, Insert, ModuleConfig, Rewrite, Shift
from torch import Tensor, nn

from qplug_ssm.mambaquant import mixers, readouts
from qplug_ssm.mixer import SelectiveMixer


class SubtractMean(nn.Module):
    """x - mean along the last axis.  mean: [C], a buffer"""

    name: ClassVar[str] = "subtract-mean"
    mean: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean.to(x.dtype)

    def config(self) -> dict[str, Any]:
        return {"channels": self.mean.shape[0]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["channels"])


@dataclass(frozen=True)
class CentreDelta(Transform):
    """δ loses its mean over all calibration rows, m; dt_proj's bias gains W_dt·m.

    Put it after what scales or rotates δ: nothing may come between a subtraction at run time and dt_proj any more.

    Source: https://arxiv.org/abs/2501.13484; the released code's reduce_mean.
    """

    name: ClassVar[str] = "mamba-centre"
    scope: ClassVar[Literal["block", "model"]] = "model"

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        own = {readout.rpartition(".")[0] for readout in readouts(topology)}
        found = [s for s in topology.sites if s.tensor == "weight" and s.module.rpartition(".")[0] in own and _is_dt_proj(s.module)]
        return {site.input: (Moments(),) for site in found}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for path, mixer in mixers(topology, model):
            for tail in mixer._tails:
                rewrite = rewrite.then(_centred(path, mixer, tail, seen, reader))
        if rewrite.empty:
            rewrite.notes = ("mamba-centre: no Mamba-1 mixer in this model; there is no δ whose mean could be taken away",)
        return rewrite


def _is_dt_proj(path: str) -> bool:
    return path.rpartition(".")[2].removesuffix("_b") == "dt_proj"


def _centred(path: str, mixer: SelectiveMixer, tail: str, seen: Mapping[Site, Seen], reader: TensorReader) -> Rewrite:
    dt_proj, x_proj = f"{path}.dt_proj{tail}", f"{path}.x_proj{tail}"
    # in float32: the module's buffer and the bias speak of the very same numbers
    mean = seen_at(Site(dt_proj).input, Moments.name, seen).mean.float().double()
    gained = reader[f"{dt_proj}.weight"].double() @ mean
    edits: dict[str, tuple[Edit, ...]] = {f"{dt_proj}.bias": (Shift(Port(f"{dt_proj}.bias", "out"), gained),)}
    if f"{x_proj}.bias" in reader and "dt_layernorm" not in mixer._modules:
        lost = torch.cat([-mean, mean.new_zeros(2 * mixer.states)])
        edits[f"{x_proj}.bias"] = (Shift(Port(f"{x_proj}.bias", "out"), lost),)
        return Rewrite(edits=edits)
    module = ModuleConfig(SubtractMean.name, {"channels": len(mean)}, {"mean": mean.float()})
    return Rewrite(edits=edits, inserts={dt_proj: Insert(module)})
