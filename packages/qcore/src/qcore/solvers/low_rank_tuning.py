"""QLLM's correction: a product of two thin matrices is learned beside each weight, and absorbed by its codes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers.granularity import spread
from qcore.solvers.reconstruct import Grid, Reconstruction


@dataclass(frozen=True, kw_only=True)
class LowRankTuning(Reconstruction):
    """Learn W + UV by what comes out of the block, U [N, r] and V [r, K], and store its codes: nothing of U and V is left at run time.

    U starts at zero, so the start is the weight solver's solution; scales stay as that found them.

    Source: https://arxiv.org/abs/2310.08041 (QLLM), section 4.3.  Differs: one block at a time, where the paper's runs take four together; inputs are
    not rounded while it learns; the float block that it is held to is the one after the transforms, so what they lose is not made good here.

    rank: r
    lr:   step size of U and V, in steps of the grid
    """

    name: ClassVar[str] = "low-rank-tuning"
    steps: int = 200
    lr: float = 0.005
    rank: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise SpecError(f"a correction has a rank of at least 1, got rank={self.rank}")

    def learned(self, grid: Grid) -> list[Tensor]:
        n, k = grid.shape
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.zeros(n, self.rank), torch.randn(self.rank, k, generator=generator) / self.rank**0.5]

    def codes(self, grid: Grid, learned: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        up, down = learned
        return grid.rounded(grid.z + up @ down * self._unit(grid)), None

    def _unit(self, grid: Grid) -> Tensor:
        """The mean step of the grid over the step of each weight: UV is of low rank in the weight, not in its codes.  [N, K]"""
        step = spread(grid.scale, grid.block, grid.shape).abs()
        return step[step > 0].mean() / torch.where(step == 0, 1.0, step)
