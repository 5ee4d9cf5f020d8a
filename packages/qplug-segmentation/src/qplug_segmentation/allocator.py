"""PTQ4RIS as an allocator: it looks at the whole float model once, and gives each weight, input and product of activations its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from qcore.errors import CalibrationError, SpecError
from qcore.model.topology import Site
from qcore.numbers import Int, NumberFormat, PerChannel, QuantSpec, Unscaled
from qcore.pipeline.look import FloatModel
from qcore.solvers.allocate import Allocator, Choice, Look, Needs
from qcore.solvers.base import WeightSolver
from torch import nn

from qplug_segmentation.capture import Loss, Sampling, capture
from qplug_segmentation.regions import MOST_BANDS, OutlierBands
from qplug_segmentation.search import (
    Candidates,
    affine_family,
    gelu_family,
    probability_family,
    search_layer,
    search_products,
    softmax_family,
    symmetric_family,
)
from qplug_segmentation.solvers import AtATap, GivenScales


@dataclass(frozen=True, kw_only=True)
class PTQ4RIS(Allocator):
    """Scales of Swin's linear layers and attentions by the Hessian of the loss, dual regions (DRQ), and bands of outliers for BERT (RORQ).

    What no pattern names keeps its rule: convolutions, BERT's products, the fusion and the decoder.

    weight_bits, input_bits: of what is chosen here; the rules say those of everything else
    searched: layers whose weight and input are searched, and attentions whose four operands are; patterns of module paths.  Linear layers only
    gelu:     of those, which read what a GELU puts out: a region below zero and one above.  () = an affine grid is searched for them too
    softmax:  "dual": probabilities have two regions;  "uniform": one
    text:     layers whose inputs get bands of magnitude.  () = none
    threshold, deviations, bands, share, rule: how bands are found and read, see `OutlierBands` and `MagnitudeBands`
    metric:   "hessian": errors of outputs weigh as the squared gradient of the loss there;  "mse": all alike
    loss:     "argmax": cross-entropy of the float model's own masks;  "sampled": of labels drawn from it (the empirical Fisher)
    rows:     "group": one scale for a weight (three for q, k and v), as released;  "channel": one for each row of it
    candidates, least, most, rounds: of the search, see `Candidates`
    sample_rows, sample_windows: rows of a layer, and windows of an attention, that are kept, over all calibration batches.  The release keeps all
    seed:     which rows are kept, which labels are drawn
    """

    name: ClassVar[str] = "ptq4ris"
    weight_bits: int = 8
    input_bits: int = 8
    searched: tuple[str, ...] = ("backbone.*",)
    gelu: tuple[str, ...] = ("*.mlp.fc2",)
    softmax: Literal["dual", "uniform"] = "dual"
    text: tuple[str, ...] = ("text_encoder.*",)
    threshold: Literal["mean", "median"] = "mean"
    deviations: float = 3.0
    bands: int = MOST_BANDS
    share: float = 0.0
    rule: Literal["nearest", "band"] = "band"
    metric: Literal["hessian", "mse"] = "hessian"
    loss: Loss = "argmax"
    rows: Literal["group", "channel"] = "group"
    candidates: int = 100
    least: float = 0.01
    most: float = 1.2
    rounds: int = 3
    sample_rows: int = 1024
    sample_windows: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weight_bits", "input_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise SpecError(f"ptq4ris: {name} is 2 to 8, got {getattr(self, name)}")
        for name in ("candidates", "rounds", "sample_rows", "sample_windows", "bands"):
            if getattr(self, name) < 1:
                raise SpecError(f"ptq4ris: {name} is 1 or more, got {getattr(self, name)}")
        if not 0 < self.least < self.most:
            raise SpecError(f"ptq4ris: candidates lie between two factors, 0 < least < most, got {self.least} and {self.most}")
        choices = {"softmax": ("dual", "uniform"), "metric": ("hessian", "mse"), "loss": ("argmax", "sampled"), "rows": ("group", "channel")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise SpecError(f"ptq4ris: {name} is one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def solvers(self) -> tuple[WeightSolver, ...]:
        return (GivenScales((1.0,)),)

    @property
    def needs(self) -> Needs:
        return "gradients" if self.metric == "hessian" else "model"

    def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
        """A choice for the weights and inputs of searched layers, the taps of searched attentions, and the inputs of the sentence encoder."""
        whole = look.model()
        if not isinstance(whole, FloatModel):
            raise CalibrationError(f"ptq4ris looks into the modules of the float model, and was given a {type(whole).__name__}")
        model, topology = whole.skeleton.model, whole.skeleton.topology
        linear = {s.module: s for s in sites if s.tensor == "weight" and isinstance(model.get_submodule(s.module), nn.Linear)}
        layers = [path for path in linear if _any(path, self.searched)]
        texts = [path for path in linear if _any(path, self.text)]
        products = self._products([s for s in topology.activations if s.tensor == "p" and _any(s.module, self.searched)], linear)
        if not (layers or products or texts):
            raise SpecError(f"ptq4ris: no linear layer that the rules quantize is called {', '.join((*self.searched, *self.text))}")
        seen = capture(
            whole,
            layers=layers,
            products=products,
            texts=texts,
            sampling=Sampling(self.sample_rows, self.sample_windows, self.seed),
            loss=self.loss if self.metric == "hessian" else None,
        )
        choices: dict[Site, Choice] = {}
        c = Candidates(self.candidates, self.least, self.most, self.rounds)
        weight = look.stored(QuantSpec(format=Int(self.weight_bits), granularity=PerChannel(0), scale="float16"))
        with torch.no_grad():
            for path in layers:
                site, matrix = linear[path], look.weight(linear[path])
                is_gelu = _any(path, self.gelu)
                family = gelu_family if is_gelu else affine_family if path.endswith("fc2") else symmetric_family
                groups = matrix.shape[0] if self.rows == "channel" else 3 if path.endswith("qkv") else 1
                found = search_layer(seen.layers[path], matrix, weight, self.input_bits, family, c, groups)
                choices[site] = Choice(weight, GivenScales(found.scales), f"weighted error {found.error:.3g}")
                choices[site.input] = Choice(_absolute(found.input), GivenScales(found.scales[:1]), str(found.input))
            softmax = softmax_family if self.softmax == "dual" else probability_family
            for path in products:
                formats = search_products(seen.products[path], self.input_bits, softmax, c)
                for name in ("q", "k", "v", "p"):
                    fmt = getattr(formats, name)
                    choices[Site(path, name)] = Choice(_absolute(fmt), AtATap(), str(fmt))
            outliers = OutlierBands(self.threshold, self.deviations, self.bands, self.share)
            for path in texts:
                fmt = outliers.fit(seen.texts[path], self.input_bits, self.rule)
                choices[linear[path].input] = Choice(_absolute(fmt), GivenScales((1.0,)), str(fmt))
        return choices

    def _products(self, taps: Sequence[Site], linear: Mapping[str, Site]) -> dict[str, str]:
        """Attentions whose output a linear layer beside them reads, with that layer; the fusion's is a convolution, and rules say what it gets."""
        return {s.module: f"{s.module}.proj" for s in taps if f"{s.module}.proj" in linear}


def _any(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _absolute(fmt: NumberFormat) -> QuantSpec:
    """The spec of an activation whose format says all."""
    return QuantSpec(format=fmt, granularity=Unscaled())
