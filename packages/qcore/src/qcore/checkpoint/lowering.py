"""Turning a quantized model into another program that runs here: what a lowering is, and the weights that it starts from.

An exporter writes a file for somebody else's runtime; a lowering gives back a module.  Its promise ("no float between token ids and logits") is a
property of the whole program, so it is audited on the whole program: `qcore.testing.integers`.
"""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import nn

from qcore.model.topology import Site, Topology
from qcore.modules import StoredWeight
from qcore.numbers import QTensor


class Lowering(Protocol):
    """Makes a whole other program of a quantized model; a lowering is its own config, and registered by the hook qcore_lowerings.

    name: lower case
    """

    name: ClassVar[str]

    def refuses(self, model: nn.Module, topology: Topology, weights: Mapping[Site, QTensor]) -> list[str]:
        """Every reason why this model cannot be lowered; empty where it can."""

    def lower(self, model: nn.Module, topology: Topology, weights: Mapping[Site, QTensor]) -> nn.Module:
        """The other program.  `model` is left as it is, and not needed afterwards.

        `qcore lower` calls that of a language model with ids [B, T]; it gives logits [B, T, V], or something whose `dequantize()` are those.
        weights: `stored_weights(model)`
        SpecError with every reason of `refuses`.
        """


def stored_weights(model: nn.Module) -> dict[Site, QTensor]:
    """The codes and scales of every module with a stored weight, by the site that they were solved for."""
    return {Site(path): module.qtensor() for path, module in model.named_modules() if isinstance(module, StoredWeight)}
