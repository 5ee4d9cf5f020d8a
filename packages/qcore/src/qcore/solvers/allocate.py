"""What an allocator is: it gives each weight what is stored and who finds it, after a look at all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from qcore.model.topology import Site
from qcore.numbers import QuantSpec
from qcore.solvers.base import WeightSolver


@dataclass(frozen=True)
class Choice:
    """What one weight gets.  why: for the record, one line"""

    spec: QuantSpec
    solver: WeightSolver
    why: str = ""


class Allocator(Protocol):
    """Chooses spec and solver for weights that a recipe's rules would quantize.

    name:    lower case
    solvers: all that it may choose, so that a plan knows whether calibration data is needed
    """

    name: ClassVar[str]

    @property
    def solvers(self) -> tuple[WeightSolver, ...]: ...

    def allocate(self, sites: Sequence[Site], weight: Callable[[Site], Tensor]) -> Mapping[Site, Choice]:
        """A choice for some or all of `sites`; the others keep their rule.

        weight: the matrix [N, K] of a site, after the transforms of the whole model; read it one at a time
        """
