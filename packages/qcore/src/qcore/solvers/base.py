"""What a solver is: it chooses codes for one matrix.  It never sees a module, a file layout or a device name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.model.topology import Block, Site
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


@dataclass
class BlockResult:
    """What a block solver found.

    codes:       stored weights by site
    activations: parts (scale, offset) of static activation sites
    biases:      corrected biases by parameter name
    edits:       a rewrite to apply besides, or None
    """

    codes: Mapping[Site, QTensor]
    activations: Mapping[Site, Mapping[str, Tensor]] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    edits: Any = None


class BlockSolver(Protocol):
    """Chooses codes for all weights of a block together, by what comes out of it (AdaRound, BRECQ, learned clipping)."""

    name: ClassVar[str]

    def solve_block(self, block: Block, module: nn.Module, specs: Mapping[Site, QuantSpec], inputs: Any) -> BlockResult: ...
