from dataclasses import dataclass
from typing import ClassVar

from qcore.calibration import Gram
from qcore.numbers import QTensor, QuantSpec, quantize
from qcore.solvers import WeightSolver
from torch import Tensor


@dataclass(frozen=True)
class Scaffold(WeightSolver):
    """Round to nearest with a smaller range: the one, of `steps`, whose outputs come closest.

    Its fields are its options: recipes fill them in.

    steps: ranges tried, from the whole one down to half of it
    """

    name: ClassVar[str] = "scaffold"
    steps: int = 8

    @property
    def observes(self) -> tuple[Gram]:
        return (Gram(),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen, frozen: Tensor | None = None) -> QTensor:
        gram = seen["gram"].to(weight)  # [K, K], Σ xᵀx of the inputs that were seen; [P, K, K] for a layer in P groups
        best, least = None, float("inf")
        for i in range(self.steps):
            limit = weight.abs().amax() * (1 - i / (2 * self.steps))
            q = quantize(weight.clamp(-limit, limit), spec)
            error = (weight - q.dequantize()).view(*gram.shape[:-2], -1, weight.shape[1])
            loss = float((error @ gram * error).sum())
            if best is None or loss < least:
                best, least = q, loss
        assert best is not None
        return best
