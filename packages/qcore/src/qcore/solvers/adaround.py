"""AdaRound layer by layer: each weight goes up or down, whichever the layer's outputs want.

A layer's squared output error is a quadratic form of its Gram matrix, so the published problem needs no passes of data:

    min over V   tr((Ŵ - W) G (Ŵ - W)ᵀ)  +  pressure · Σ (1 - |2h(V) - 1|^β),     Ŵ = scale · (⌊W / scale⌋ + h(V))

with h the stretched sigmoid and β falling from 20 to 2.  Rows are apart: each is solved beside the others, and one that comes out no better than
rounded to nearest stays so.  The solver of whole blocks with the same name (`block_solver`) runs the block in each step instead.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import Int, QTensor, QuantSpec
from qcore.solvers.reconstruct import Grid
from qcore.solvers.rtn import RTN
from qcore.solvers.scales import ScaleSearch


@dataclass(frozen=True, kw_only=True)
class LayerAdaRound(ScaleSearch):
    """Learned rounding of one weight by the Gram matrix of its inputs; integers under fixed scales, which are those of nearest rounding.

    Source: https://arxiv.org/abs/2004.10568, equations 21 to 24, without the activation function between (the paper's asymmetric variant).  Differs:
    the expectation over inputs is taken beforehand, in G; the loss of a row is relative to that of nearest rounding.

    clip, norm, shrink, steps, signed_scale: of the search for scales, as of RTN
    rounds:   steps of Adam;  lr: its step size
    pressure: weight of the term that presses h to 0 or 1, after the first fifth of the rounds
    """

    name: ClassVar[str] = "adaround"
    clip: Literal["none", "mse"] = "mse"
    rounds: int = 400
    lr: float = 0.02
    pressure: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or self.lr <= 0 or self.pressure < 0:
            raise SpecError(f"AdaRound wants rounds >= 1, lr > 0 and pressure >= 0, got {self.rounds}, {self.lr}, {self.pressure}")

    @property
    def observes(self) -> tuple[Observer, ...]:
        from qcore.calibration.observers import Gram

        return (Gram(),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """See `WeightSolver.solve`.  SpecError for anything but integers of two bits and more under scales."""
        if not isinstance(spec.format, Int) or (spec.format.signed and spec.format.bits == 1) or not spec.scaled:
            raise SpecError(f"AdaRound moves codes by one step of an even grid, and {spec} has none; use RTN or GPTQ")
        if "gram" not in seen:
            raise CalibrationError("AdaRound got no 'gram' of the inputs; calibrate this site, or use RTN()")
        w = weight.detach().float()
        search = RTN(clip=self.clip, norm=self.norm, shrink=self.shrink, steps=self.steps, signed_scale=self.signed_scale)
        start = search.solve(w, spec, seen, frozen)
        grid, lo, hi = Grid(w, start), spec.format.lo, spec.format.hi
        below = grid.raw.clamp(lo, hi).floor()
        free = below + 1 <= hi if frozen is None else (below + 1 <= hi) & frozen.isnan()
        loss = _OutputError(w, seen["gram"].float(), frozen)
        first = loss(grid.values(grid.codes))
        share = torch.where(free, grid.raw.clamp(lo, hi) - below, 0.0).clamp(0.01, 0.99)
        v = -(1.2 / (share + 0.1) - 1).log()
        optimizer = torch.optim.Adam([v.requires_grad_()], lr=self.lr)
        for i in range(self.rounds):
            with torch.enable_grad():
                h = _stretched(v)
                codes = torch.where(free, below + h, grid.codes)
                total = (loss(grid.values(codes)) / first.clamp(min=1e-30)).sum()
                if i >= self.rounds / 5:
                    beta = 2 + 18 * (1 - (i / self.rounds - 0.2) / 0.8)
                    total = total + self.pressure * (1 - (2 * h - 1).abs().pow(beta)).mean(1).sum()
                optimizer.zero_grad()
                total.backward()
            optimizer.step()
        codes = torch.where(free, below + (_stretched(v.detach()) >= 0.5), grid.codes)
        better = loss(grid.values(codes)) < first
        return grid.stored(torch.where(better.unsqueeze(1), codes, grid.codes))


class _OutputError:
    """Each row's share of tr(ΔW G ΔWᵀ).  gram: [K, K], or [P, K, K] where each N/P rows have inputs of their own"""

    def __init__(self, weight: Tensor, gram: Tensor, frozen: Tensor | None) -> None:
        self.weight, self.frozen = weight, frozen
        self.gram = gram if gram.ndim == 3 else gram.unsqueeze(0)

    def __call__(self, values: Tensor) -> Tensor:
        """values: [N, K] → [N]"""
        stands = values if self.frozen is None else torch.where(self.frozen.isnan(), values, self.frozen.float())
        delta = (stands - self.weight).unflatten(0, (self.gram.shape[0], -1))
        return (delta @ self.gram * delta).sum(-1).flatten()


def _stretched(v: Tensor) -> Tensor:
    """The sigmoid, stretched to (-0.1, 1.1) and clipped, so that 0 and 1 are reached.  AdaRound, equation 23"""
    return (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
