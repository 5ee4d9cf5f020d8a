"""Which code stands for which weight: solvers of one weight, and what they share."""

from qcore.solvers.allocate import Allocator, Choice
from qcore.solvers.base import BlockResult, BlockSolver, WeightSolver
from qcore.solvers.gptq import GPTQ
from qcore.solvers.gptvq import GPTVQ
from qcore.solvers.hqq import HQQ
from qcore.solvers.rtn import RTN
from qcore.solvers.scales import ScaleSearch

__all__ = ["GPTQ", "GPTVQ", "HQQ", "RTN", "Allocator", "BlockResult", "BlockSolver", "Choice", "ScaleSearch", "WeightSolver"]
