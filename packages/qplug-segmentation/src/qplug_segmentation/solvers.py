"""Weight solvers: scales that were found elsewhere, and an affine grid searched in two dimensions."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.numbers import Int, Offset, PerChannel, QTensor, QuantSpec, quantize
from qcore.numbers.tensor import store_scale
from qcore.solvers.base import WeightSolver
from torch import Tensor


@dataclass(frozen=True)
class GivenScales(WeightSolver):
    """Round to nearest on given scales, one for each group of N / len(scales) rows.  For allocators that search; specs have a scale a row."""

    name: ClassVar[str] = "given-scales"
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.scales or any(not s > 0 for s in self.scales):
            raise SpecError(f"given scales are one or more positive numbers, got {self.scales}")

    @property
    def observes(self) -> tuple[Observer, ...]:
        return ()

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """See `WeightSolver.solve`."""
        n = weight.shape[0]
        if spec.granularity != PerChannel(0) or spec.offset is not Offset.NONE or isinstance(spec.scale, QuantSpec):
            raise SpecError(f"given scales are of rows, without an offset, got {spec}; use granularity 'channel'")
        if n % len(self.scales):
            raise SpecError(f"{len(self.scales)} groups of rows do not divide N={n}")
        w = weight.detach().float()
        if frozen is not None:
            w = torch.where(frozen.isnan(), w, 0.0)
        rows = torch.tensor(self.scales).repeat_interleave(n // len(self.scales)).unsqueeze(1)
        return quantize(w, spec, store_scale(rows, spec))


@dataclass(frozen=True)
class AtATap(WeightSolver):
    """Stands where a choice for a tap has no weight to solve.

    The journal of a run keeps choices for weights and their inputs alone, and would refuse others when it goes on; `unkept` is nothing that a file
    can hold, so an allocation with taps is not kept, and a run that was interrupted finds it anew.
    """

    name: ClassVar[str] = "at-a-tap"
    unkept: object = field(default_factory=object, compare=False, repr=False)

    @property
    def observes(self) -> tuple[Observer, ...]:
        return ()

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        raise SpecError("a tap has no weight; a choice for it was applied to one")


@dataclass(frozen=True)
class AffineSearch(WeightSolver):
    """For each row, the scale and the zero point of least Σ |error|^p: ranges shrunk in `steps` steps, each with zero points around its own.

    A range i/steps of max - min has a scale; of zero points, all within `reach` of the one that the row's own ends call for are tried.
    Source: the two-dimensional search of PTQ4RIS's (QDrop's) MSE observer, which tries all 2^bits zero points for each of 100 ranges: at 8 bits
    25,600 candidates a row.  Rows of one sign are searched in one dimension there and here.

    p: exponent of the error
    """

    name: ClassVar[str] = "affine-search"
    steps: int = 100
    p: float = 2.4
    reach: int = 3

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.p > 0 or self.reach < 0:
            raise SpecError(f"a search has 1 step or more, p > 0 and reach ≥ 0, got steps={self.steps}, p={self.p}, reach={self.reach}")

    @property
    def observes(self) -> tuple[Observer, ...]:
        return ()

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """See `WeightSolver.solve`."""
        fmt = spec.format
        if not isinstance(fmt, Int) or spec.granularity != PerChannel(0) or spec.offset is not Offset.CODE or isinstance(spec.scale, QuantSpec):
            raise SpecError(f"affine-search finds an integer zero point for each row, got {spec}; use int, granularity 'channel', offset 'code'")
        w = weight.detach().float()
        if frozen is not None:
            w = torch.where(frozen.isnan(), w, 0.0)
        low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)  # [N, 1]
        span = torch.where(high > low, high - low, 1.0)
        levels = fmt.hi - fmt.lo
        best = torch.full_like(span, torch.inf)
        best_scale, best_zero = store_scale(span / levels, spec)["scale"].float(), torch.zeros_like(span)
        for i in range(self.steps, 0, -1):
            scale = store_scale(span * (i / self.steps) / levels, spec)["scale"].float()
            own = (fmt.lo - low * (i / self.steps) / scale).round()
            for shift in range(-self.reach, self.reach + 1):
                # a row of one sign keeps its zero at the end
                zero = torch.where((low < 0) & (high > 0), own + shift, own).clamp(fmt.lo, fmt.hi)
                values = ((w / scale + zero).round().clamp(fmt.lo, fmt.hi) - zero) * scale
                error = (values - w).abs().pow(self.p).sum(1, keepdim=True)
                better = error < best
                best, best_scale, best_zero = (torch.where(better, a, b) for a, b in ((error, best), (scale, best_scale), (zero, best_zero)))
        return quantize(w, spec, {"scale": best_scale, "offset": best_zero.to(torch.int8 if fmt.lo < 0 else torch.uint8)})
