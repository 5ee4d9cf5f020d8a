"""Which code stands for which weight: solvers of one weight, and what they share."""

from qcore.solvers.base import BlockResult, BlockSolver, WeightSolver
from qcore.solvers.gptq import GPTQ
from qcore.solvers.rtn import RTN
from qcore.solvers.scales import ScaleSearch

__all__ = ["GPTQ", "RTN", "BlockResult", "BlockSolver", "ScaleSearch", "WeightSolver"]
