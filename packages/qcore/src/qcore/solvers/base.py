"""What a solver is: it chooses codes for one matrix, or for all of a block.  It never sees a module, a file layout or a device name."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.model.topology import Site
from qcore.numbers import QTensor, QuantSpec


class WeightSolver(Protocol):
    """Chooses codes, scales and fitted parts for one weight.

    name:     lower case
    observes: prototypes of the observers whose results it wants of the weight's input; empty = data-free
    """

    name: ClassVar[str]

    @property
    def observes(self) -> tuple[Observer, ...]: ...

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """The stored form of `weight`.

        weight: [N, K] float
        seen:   results by observer name, of the weight's input; "gram" is [K, K], or [P, K, K] where each N/P rows see inputs of their own
        frozen: [N, K], NaN where the solver is free, else the value that will stand there whatever the code is (kept elsewhere, in a second leaf);
                its code is then the one nearest zero
        """


class BlockView(Protocol):
    """One block, as a block solver may run it: the same calibration batches go in, other weights stand in it.

    weights: float matrices [N, K] by site
    start:   what the solvers of single weights found
    shares:  importance of each row of a batch, one number a batch; 1 = as any other
    """

    @property
    def weights(self) -> Mapping[Site, Tensor]: ...

    @property
    def start(self) -> Mapping[Site, QTensor]: ...

    @property
    def shares(self) -> Sequence[float]: ...

    def target(self, batch: int) -> Tensor:
        """What the float block puts out, in the sense of `BlockSolver.target`; padding is left out.  [rows, C]"""

    def run(self, batch: int, matrices: Mapping[Site, Tensor]) -> Tensor:
        """What it puts out with these matrices [N, K] in the place of its weights; differentiable in them.  [rows, C]"""


class BlockSolver(Protocol):
    """Improves the codes of all weights of a block together, by what comes out of the block, once each weight has been solved on its own.

    name:   lower case
    target: "float": what the block puts out in the float model, so that errors of the blocks before are made good too; "same": what the float block
            puts out for the very inputs that the quantized one reads
    """

    name: ClassVar[str]
    target: Literal["float", "same"] = "same"

    def refuses(self, spec: QuantSpec) -> str | None:
        """Why it cannot work on weights that are stored so, or None; they keep the codes that they have."""

    def solve_block(self, view: BlockView) -> Mapping[Site, QTensor]:
        """Other codes for some or all weights of the block, under the specs of `view.start`; the others keep theirs."""
