"""QANS: a softmax's input is quantized after its largest value was taken off, so that eight bits are spent where probabilities are.

x̂ = x - max(x) in full precision, then codes of [-β, 0] in steps of β / (2^b - 1), values below -β clipped.  Quantized before, a row's scale is
that of the largest logit of all rows, and its top is rounded by half a step.

β comes from candidates, by the mean L1 distance between the softmax of codes and that of floats, on calibration data.  The paper finds β = 20
without loss; on normal logits 15 is as good or better, below 10 it is much worse.

Source: FQ-PETR, https://arxiv.org/abs/2502.15488, section on QANS.  The repository that the paper names holds no code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from qcore.calibration import Seen
from qcore.calibration.observers import State, StreamingObserver
from qcore.errors import SpecError
from qcore.model import Site, TensorReader, Topology
from qcore.numbers import QuantSpec
from qcore.transforms import Rewrite, Transform
from qcore.transforms.channels import seen_at
from qcore.transforms.rewrite import Insert, ModuleConfig
from torch import Tensor, nn

from qplug_perception.petr.dulut import build, fixed_cascade, fraction_bits, tails

CANDIDATES = (5.0, 10.0, 15.0, 20.0, 25.0, 30.0)
SCORES = "scores"  # the tap before a softmax


def stabilized(x: Tensor) -> Tensor:
    """x minus the largest value of its row; -inf (a mask) stays, and a row of nothing but -inf too."""
    top = x.amax(-1, keepdim=True)
    return x - torch.where(top.isinf(), 0.0, top)


def codes(away: Tensor, beta: float | Tensor, bits: int) -> Tensor:
    """Steps below zero, 0 … 2^bits - 1, of stabilized logits; as a float tensor."""
    levels = (1 << bits) - 1
    return (away * (-levels / beta)).clamp(0, levels).round()


def quantized_softmax(x: Tensor, beta: float | Tensor, bits: int = 8) -> Tensor:
    """softmax over the last axis, of codes after stabilization; masked places give 0."""
    away = stabilized(x)
    term = torch.where(away == -torch.inf, 0.0, (-codes(away, beta, bits) * (beta / ((1 << bits) - 1))).exp())
    return term / term.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


class StableSoftmax(nn.Module):
    """softmax over the last axis, of codes of the stabilized input; in an nn.Softmax's place.

    beta:  [] float32 buffer
    exp:   "float", or "dulut": looked up in two tables over [-β, 0]
    first, second: the tables, where there are any
    """

    name: ClassVar[str] = "stable-softmax"
    beta: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, beta: Tensor, bits: int = 8, tables: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise SpecError(f"a softmax's input has 2 to 16 bits, got {bits}")
        self.bits = bits
        self.register_buffer("beta", beta)
        if tables is not None:
            self.register_buffer("first", tables[0])
            self.register_buffer("second", tables[1])
        self.looks_up = tables is not None

    @classmethod
    def of(cls, beta: float, bits: int = 8, entries: tuple[int, int] | None = None) -> Self:
        """entries: of the two tables of exp; None = exp in floats"""
        tables = None
        if entries is not None:
            built = build("exp", -beta, 0.0, *entries)
            tables = ((built.first * (1 << fraction_bits(entries[1]))).round().to(torch.int32), built.second.float())
        return cls(torch.tensor(float(beta)), bits, tables)

    def forward(self, x: Tensor) -> Tensor:
        beta = self.beta.to(x.dtype)
        if not self.looks_up:
            return quantized_softmax(x, beta, self.bits)
        away = stabilized(x)
        grid = -codes(away, beta, self.bits) * (beta / ((1 << self.bits) - 1))
        low = -float(self.beta)
        term = fixed_cascade(grid, self.first, self.second, fraction_bits(len(self.second)), low, 0.0, tails("exp"))
        term = torch.where(away == -torch.inf, 0.0, term.clamp(min=0))
        return term / term.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)

    def config(self) -> dict[str, Any]:
        return {"bits": self.bits, "entries": [len(self.first), len(self.second)] if self.looks_up else None}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        entries = config["entries"]
        tables = None if entries is None else (torch.zeros(entries[0], dtype=torch.int32), torch.zeros(entries[1]))
        return cls(torch.ones(()), config["bits"], tables)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, exp {'from two tables' if self.looks_up else 'in floats'}"


@dataclass(kw_only=True)
class SoftmaxDistance(StreamingObserver):
    """Mean over rows of Σ |softmax(Q(x̂)) - softmax(x)| for each candidate β.  [number of candidates] float64

    candidates: values of β
    bits:       of the codes
    rows:       of each batch at most so many, evenly spaced: a row is as long as there are keys
    """

    name: ClassVar[str] = "softmax-distance"
    parts: ClassVar[tuple[str, ...]] = ("distance", "mass")
    candidates: tuple[float, ...] = CANDIDATES
    bits: int = 8
    rows: int = 2048

    def update(self, rows: Tensor, weight: Tensor | None = None) -> None:
        """A mask's -inf is a very low number here: rows must be finite."""
        super().update(rows.clamp(min=-1e30), weight)

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        x, stride = rows.flatten(0, -2), max(1, -(-rows.flatten(0, -2).shape[0] // self.rows))
        x = x[::stride].double()
        share = torch.ones(len(x), dtype=torch.float64) if weight is None else weight[::stride]
        exact = x.softmax(-1)
        away = [(quantized_softmax(x, beta, self.bits) - exact).abs().sum(-1) @ share for beta in self.candidates]
        return {"distance": torch.stack(away), "mass": share.sum()}

    def _join(self, a: State, b: State) -> State:
        return {part: a[part] + b[part] for part in self.parts}

    def _finish(self, state: State) -> Tensor:
        return state["distance"] / state["mass"]


@dataclass(frozen=True)
class QANS(Transform):
    """Put a `StableSoftmax` in the place of the softmax of every attention that taps "scores" and has a child `softmax`.

    bits:       of the stabilized logits
    candidates: of β; one of them alone needs no calibration data
    exp:        "float", or "dulut": two tables of 32 entries.  Each key's term is then off by up to 8e-4, so rows of thousands of keys are better
    left
                with "float": the tables are built for the largest error, not for the sum of many small ones
    """

    name: ClassVar[str] = "qans"
    exact: ClassVar[bool] = False
    bits: int = 8
    candidates: tuple[float, ...] = CANDIDATES
    exp: Literal["float", "dulut"] = "float"
    first: int = 32
    second: int = 32

    def __post_init__(self) -> None:
        if not self.candidates or not all(b > 0 for b in self.candidates):
            raise SpecError(f"qans: candidates of β are positive, got {self.candidates}")
        if self.exp not in ("float", "dulut"):
            raise SpecError(f"qans: exp is 'float' or 'dulut', got {self.exp!r}")
        if not 2 <= self.bits <= 16:
            raise SpecError(f"qans: a softmax's input has 2 to 16 bits, got {self.bits}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Any, ...]]:
        if len(self.candidates) == 1:
            return {}
        return {site: (SoftmaxDistance(candidates=tuple(self.candidates), bits=self.bits),) for site in _places(topology)}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        inserts, notes = {}, []
        for site in _places(topology):
            if not isinstance(getattr(model.get_submodule(site.module), "softmax", None), nn.Softmax):
                raise SpecError(f"{site}: qans replaces an nn.Softmax called `softmax`, which {site.module} does not have")
            beta = self.candidates[0]
            if len(self.candidates) > 1:
                beta = self.candidates[int(seen_at(site, SoftmaxDistance.name, seen).argmin())]
            module = StableSoftmax.of(beta, self.bits, (self.first, self.second) if self.exp == "dulut" else None)
            inserts[f"{site.module}.softmax"] = Insert(ModuleConfig(module.name, module.config(), dict(module.state_dict())), "instead")
            notes.append(f"{site.module}: β = {beta:g}")
        # what rounding a softmax's input does to the outputs depends on the logits; 0.1 is what this transform answers for
        return Rewrite(inserts=inserts, notes=tuple(notes), exact=0.1 if inserts else 1e-9)


def _places(topology: Topology) -> list[Site]:
    return [site for site in topology.activations if site.tensor == SCORES]
