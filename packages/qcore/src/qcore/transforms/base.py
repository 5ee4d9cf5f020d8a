"""What a transform is: it finds a function-preserving rewrite, and touches no weight itself."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol

from torch import nn

from qcore.calibration.observer import Observer, Seen
from qcore.model.reader import TensorReader
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.rewrite import Rewrite


class Transform(Protocol):
    """Finds a rewrite that keeps the function and eases the numbers.

    name:  lower case
    scope: "block": fitted block by block, on the outputs of the quantized blocks before, with the links inside the block;
           "model": fitted once, before any block is solved, with all links (residual rotations)
    exact: whether outputs stay equal up to rounding; False needs a stated `Rewrite.exact`
    parts: what it calls the leaves that it makes of one, ("coarse", "fine") for a split: rules may name them before they are there
    """

    name: ClassVar[str]
    scope: ClassVar[Literal["block", "model"]] = "block"
    exact: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ()

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        """What it needs to see, by site (inputs of weights, usually); {} for data-free transforms."""
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        """The rewrite, given what was seen.

        topology: of the block, or of the model, as the scope says
        specs:    what the recipe wishes to store, for sites of weights and of activations
        model:    for module types and layouts; its parameters may be on meta, weights come from `reader` (earlier transforms applied)
        """
