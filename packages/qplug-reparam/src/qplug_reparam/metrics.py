"""The improved KL metric of CFWS for the scale of activations.

The four metrics that the paper's ablation compares are observers, to be named in a recipe's rule of inputs:

| metric | observer |
|---|---|
| min-max | qcore's `minmax` |
| KL as TensorRT has it | qcore's `kl` |
| improved KL | `kl-improved`, here |
| mean squared error | qcore's `mse` with `p = 2` |

**Inferred.**  The calibrator of https://arxiv.org/abs/2312.10588 is not in its release: only its use is.  From the release come the two passes over
a histogram, 8 bits, and the option of positive values alone where a ReLU reads them.  Inferred, from the abstract and what it says of rare large
values, are: the reference keeps its tail in its own bins (TensorRT adds it to the last one, which rewards early clipping), smoothing by ε, the bin of
zero left out, ties to the larger threshold, and the guard that keeps min-max where that errs less.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from qcore.calibration.observers import Histogram, Range, State
from qcore.errors import SpecError
from qcore.numbers import Int, PerTensor, QuantSpec, fake_quantize, scale_parts
from torch import Tensor


@dataclass(kw_only=True)
class ImprovedKL(Histogram):
    """The range whose rounded values are distributed most like the values themselves, the tail included: min over T of KL(P ‖ Q).

    P is the whole histogram.  Q is that of the rounded values: what is clipped lies at ±T, and every level's mass is spread evenly over the bins with
    values that round to it, so bins beyond T are empty.  Both are smoothed by `smoothing`, and the bins next to zero are left out (they hold what a
    ReLU cut off, which every scale stores exactly).

    bins:       per sign, 2048 to 8192 in the paper's setting; a power of two
    candidates: thresholds that are tried, evenly from `least` of the largest magnitude to all of it
    positive:   look at positive values alone, where a ReLU reads the tensor
    guard:      keep the extremes where rounding with them has the smaller mean squared error on what was seen
    """

    name: ClassVar[str] = "kl-improved"
    bins: int = 4096
    candidates: int = 128
    least: float = 0.05
    positive: bool = False
    guard: bool = True
    smoothing: float = 1e-6
    spec: QuantSpec = field(default_factory=lambda: QuantSpec(format=Int(8), granularity=PerTensor()))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 2 or not 0 < self.least < 1 or self.smoothing <= 0:
            got = f"{self.candidates}, {self.least}, {self.smoothing}"
            raise SpecError(f"observer 'kl-improved' needs candidates ≥ 2, least in (0, 1) and smoothing > 0, got {got}")
        if not isinstance(self.spec.granularity, PerTensor) or not isinstance(self.spec.format, Int):
            raise SpecError(
                f"observer 'kl-improved' finds one range for a whole tensor of integers, got {self.spec}; take granularity 'tensor' and int"
            )

    def for_spec(self, spec: QuantSpec) -> Self:
        return replace(self, spec=spec)

    def _finish(self, state: State) -> Range:
        edges, counts = self._ascending(state)
        if self.positive:
            counts = torch.where(edges[:-1] < 0, 0.0, counts)
        middles = ((edges[1:] + edges[:-1]) / 2).clamp(state["low"], state["high"])
        low, high = state["low"].clamp(max=0), state["high"].clamp(min=0)
        if self.positive:
            low = torch.zeros_like(low)
        used = counts > 0
        x, mass = middles[used].float(), counts[used]
        largest = float(torch.maximum(-low, high))
        apart = x.abs() >= self._width(state)  # all but the bins next to zero
        if largest == 0 or not bool(apart.any()):
            return low.reshape(1), high.reshape(1)
        thresholds = torch.linspace(self.least, 1.0, self.candidates, dtype=torch.float64) * largest
        # from the largest down, so that the first of equals is the larger
        best = min((float(t) for t in thresholds.flip(0)), key=lambda t: self._divergence(x, mass, apart, low, high, t))
        if self.guard and self._error(x, mass, low, high, best) >= self._error(x, mass, low, high, largest):
            best = largest
        return low.clamp(min=-best).reshape(1), high.clamp(max=best).reshape(1)

    def _rounded(self, x: Tensor, low: Tensor, high: Tensor, t: float) -> Tensor:
        a, b = low.clamp(min=-t).reshape(1), high.clamp(max=t).reshape(1)
        return fake_quantize(x, self.spec, scale_parts(a, b, self.spec))

    def _divergence(self, x: Tensor, mass: Tensor, apart: Tensor, low: Tensor, high: Tensor, t: float) -> float:
        inside = x.abs() <= t
        levels, level = self._rounded(x, low, high, t).unique(return_inverse=True)
        total = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level, mass)
        bins = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level, inside.double())
        q = torch.where(inside, total[level] / bins[level].clamp(min=1), 0.0)
        p, q = mass[apart], q[apart]
        p, q = p / p.sum() + self.smoothing, q / q.sum().clamp(min=1e-300) + self.smoothing
        p, q = p / p.sum(), q / q.sum()
        return float((p * (p / q).log()).sum())

    def _error(self, x: Tensor, mass: Tensor, low: Tensor, high: Tensor, t: float) -> float:
        return float(((self._rounded(x, low, high, t) - x).double().square() * mass).sum())
