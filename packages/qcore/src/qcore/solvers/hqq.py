"""HQQ: scales and offsets that make the *rounding error sparse*, found without data by half-quadratic splitting."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import Offset, QTensor, QuantSpec
from qcore.numbers.tensor import require_finite
from qcore.solvers.scales import Lattice, ScaleSearch, choose_all, per_row


@dataclass(frozen=True, kw_only=True)
class HQQ(ScaleSearch):
    """Choose scale and offset of each block for the least Σ|w - ŵ|^p with p < 1: outliers may err, the many others shall not.

    Two steps alternate.  The error that may stay is E = prox(W - Ŵ), every entry shrunk by |x|^(p-1)/β and those below that dropped; then scale and
    offset are the least-squares ones for the codes at hand and W - E in W's place.  Each block keeps the best that it saw, so no step makes it worse.
    With an integer zero point (offset "code") scales alone are fitted.  `clip` says what it starts from; "none" as the source.

    Source: https://mobiusml.github.io/hqq_blog/.  Differs: the released code fits the zero point alone, and shrinks in units of the weights: at
    β = 10 an error of less than 0.17 is dropped, which is every error of a layer with weights of 0.02, so there it is plain least squares.  Here
    errors are counted in steps of the block, and the scale is fitted too.

    power:      p, in (0, 1]
    beta, kappa: weight of the splitting, and its growth from one round to the next
    iterations: rounds
    weighted:   weigh each input's error by its mean square, as RTN's option; needs calibration data
    """

    name: ClassVar[str] = "hqq"
    clip: Literal["none", "mse"] = "none"
    power: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    weighted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.power <= 1 or self.beta <= 0 or self.kappa < 1 or self.iterations < 1:
            got = f"{self.power}, {self.beta}, {self.kappa}, {self.iterations}"
            raise SpecError(f"HQQ wants power in (0, 1], beta > 0, kappa >= 1 and at least one iteration, got {got}")

    @property
    def observes(self) -> tuple[Observer, ...]:
        if not self.weighted:
            return ()
        from qcore.calibration.observers import Gram

        return (Gram(),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """See `WeightSolver.solve`.  Frozen entries take no part in the fit."""
        if not spec.scaled or spec.format.dim > 1 or spec.format.parts:
            raise SpecError(f"HQQ fits scales of numbers that are fixed beforehand, got {spec}; use GPTVQ or RTN for fitted codebooks")
        w = weight.detach().float()
        require_finite(w)
        importance = None
        if self.weighted:
            if "gram" not in seen:
                raise CalibrationError("HQQ(weighted=True) got no 'gram' of the inputs; calibrate this site, or use HQQ()")
            importance = per_row(seen["gram"].diagonal(dim1=-2, dim2=-1).float(), w.shape[0])  # [K, 1] or [K, N]
        if frozen is not None:
            free = frozen.isnan()
            w = torch.where(free, w, 0.0)
            importance = free.T.float() if importance is None else importance * free.T
        lattice, wt = Lattice(spec, tuple(w.shape)), w.T.contiguous()
        choose_all(wt, lattice, self, importance)
        codes = torch.empty(wt.shape, dtype=lattice.code_dtype())
        for g in range(lattice.G):
            cols = slice(g * lattice.bc, min((g + 1) * lattice.bc, wt.shape[0]))
            self._fit(g, wt[cols], lattice, None if importance is None else importance[cols])
            codes[cols] = lattice.quantize(wt[cols], g)[0].to(codes.dtype)
        return lattice.qtensor(codes.T.contiguous())

    def _fit(self, g: int, x: Tensor, lattice: Lattice, weight: Tensor | None) -> None:
        """Improve scale and offset of group g in place.  x: [m, N]; weight: [m, 1], [m, N] or None"""

        def error() -> Tensor:
            return lattice.error(g, x, lattice.scale[g], None if lattice.offset is None else lattice.offset[g], self.power, weight)

        heavy = torch.ones_like(x) if weight is None else weight.expand_as(x)
        best = error()
        best_scale, best_offset = lattice.scale[g].clone(), None if lattice.offset is None else lattice.offset[g].clone()
        beta = self.beta
        for _ in range(self.iterations):
            codes, value = lattice.quantize(x, g)
            step = lattice.rows(lattice.scale[g].abs())
            step = torch.where(step > 0, step, 1.0)
            stays = step * shrink((x - value) / step, beta, self.power)
            self._least_squares(g, x - stays, lattice.units(codes, g), heavy, lattice)
            now = error()
            better = now < best
            best = torch.where(better, now, best)
            best_scale = torch.where(better, lattice.scale[g], best_scale)
            if best_offset is not None and lattice.offset is not None:
                best_offset = torch.where(better, lattice.offset[g], best_offset)
            beta *= self.kappa
        lattice.scale[g] = best_scale
        if best_offset is not None and lattice.offset is not None:
            lattice.offset[g] = best_offset

    def _least_squares(self, g: int, target: Tensor, q: Tensor, heavy: Tensor, lattice: Lattice) -> None:
        """Scale (and float offset) of the line target ≈ scale·q + offset of each block, as they can be stored."""
        over, free = lattice.over_blocks, lattice.offset is not None and lattice.spec.offset is Offset.VALUE
        mass = over(heavy.sum(0)).clamp(min=1e-30)
        mean_q = over((heavy * q).sum(0)) / mass if free else torch.zeros(lattice.R)
        mean_t = over((heavy * target).sum(0)) / mass if free else torch.zeros(lattice.R)
        dq = q - lattice.rows(mean_q)
        curve = over((heavy * dq * dq).sum(0))
        slope = over((heavy * dq * (target - lattice.rows(mean_t))).sum(0))
        fits = (curve > 0) & (slope != 0)
        ideal = torch.where(fits, slope / torch.where(curve > 0, curve, 1.0), lattice.scale[g])
        lattice.scale[g] = lattice.refit_scale(g, ideal)
        if free:
            assert lattice.offset is not None
            lattice.offset[g] = lattice.refit_offset(g, mean_t - lattice.scale[g] * mean_q)


def shrink(x: Tensor, beta: float, power: float) -> Tensor:
    """The generalized soft threshold sign(x)·max(|x| - |x|^(p-1)/β, 0): what minimizes |e|^p + β/2·(e - x)², approximately for p < 1."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12).pow(power - 1) / beta).clamp(min=0)
