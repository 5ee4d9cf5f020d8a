"""Which code stands for which weight: solvers of one weight, and what they share."""

from qcore.solvers.allocate import Allocator, Choice, Look, WholeModel
from qcore.solvers.base import BlockSolver, BlockView, WeightSolver
from qcore.solvers.gptq import GPTQ
from qcore.solvers.gptvq import GPTVQ
from qcore.solvers.hqq import HQQ
from qcore.solvers.mixed import Candidate, Mixed
from qcore.solvers.reconstruct import AdaRound, LearnedClipping, SignRound
from qcore.solvers.rtn import RTN
from qcore.solvers.scales import ScaleSearch

__all__ = [
    "GPTQ",
    "GPTVQ",
    "HQQ",
    "RTN",
    "AdaRound",
    "Allocator",
    "BlockSolver",
    "BlockView",
    "Candidate",
    "Choice",
    "LearnedClipping",
    "Look",
    "Mixed",
    "ScaleSearch",
    "SignRound",
    "WeightSolver",
    "WholeModel",
]
