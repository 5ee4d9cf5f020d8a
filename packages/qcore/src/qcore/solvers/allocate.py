"""What an allocator is: it gives each weight what is stored and who finds it, after a look at all of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.model.topology import Site
from qcore.numbers import QuantSpec
from qcore.solvers.base import WeightSolver

Needs = Literal["weights", "inputs", "model", "gradients"]


@dataclass(frozen=True)
class Choice:
    """What one weight gets.  why: for the record, one line"""

    spec: QuantSpec
    solver: WeightSolver
    why: str = ""


class WholeModel(Protocol):
    """The float model, all of it in memory, with its calibration batches."""

    @property
    def batches(self) -> int: ...

    def outputs(self, batch: int, matrices: Mapping[Site, Tensor] | None = None) -> Tensor:
        """What the model puts out for a batch with these matrices [N, K] in place of its own; differentiable in them.  [rows, C]"""

    def blocks(self, batch: int) -> Iterator[tuple[tuple[Site, ...], Tensor, Tensor]]:
        """The sites of each block, with what goes into the block and what comes out of it.  [rows, C] each"""


class Look(Protocol):
    """What an allocator may see of a run, all of it after the transforms of the whole model."""

    def weight(self, site: Site) -> Tensor:
        """The matrix of a site, [N, K]; read it one at a time."""

    def stored(self, spec: QuantSpec) -> QuantSpec:
        """The spec as the run would store it: with the scale dtype that suits the model."""

    def nbytes(self, site: Site, spec: QuantSpec) -> int | None:
        """Bytes of the packed weight under that spec; None where it cannot be stored so."""

    def observe(self, wants: Mapping[Site, Sequence[Observer]]) -> Iterator[tuple[Site, Seen]]:
        """What was seen at the inputs of these weights while the float model ran, block after block; nothing of a block is kept after it."""

    def model(self) -> WholeModel:
        """The float model in memory; CalibrationError where the run is streamed."""


class Allocator(Protocol):
    """Chooses spec and solver for weights that a recipe's rules would quantize.

    name:    lower case
    solvers: all that it may choose, so that a plan knows whether calibration data is needed
    needs:   what it looks at: the weights alone; what reaches them, which takes calibration data; the outputs of the whole float model, in memory;
             or their gradients
    """

    name: ClassVar[str]

    @property
    def solvers(self) -> tuple[WeightSolver, ...]: ...

    @property
    def needs(self) -> Needs:
        return "weights"

    def problems(self, values: Mapping[Site, int], nbytes: Callable[[Site, QuantSpec], int | None]) -> list[str]:
        """What stands against it, before anything is computed.  values: numbers in each weight; nbytes: as `Look.nbytes`"""
        return []

    def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
        """A choice for some or all of `sites`; the others keep their rule."""
