"""Calibration sources that make their data: a model samples its own text, an attack searches inputs.

A source that only reads (`TextFile`) needs no model; one that generates is asked while the float model is in memory.
"""

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor, nn

from qcore.calibration.text import Amount

Progress = Callable[[str, int, int], None]


class CalibrationSource(Protocol):
    """Makes calibration data with the float model.  In a recipe: calibration.source = { name = "ebss", tau = 1.2 }

    name: lower case
    """

    name: ClassVar[str]

    def needs_text(self) -> bool:
        """Whether it goes on from windows of the calibration text, which must then be there."""

    def kept(self, model: nn.Module, settings: Amount) -> Tensor | None:
        """Windows that were made before and are kept in a file, if they are what would be made now; `model` may be on meta.  None = make them."""

    def windows(self, model: nn.Module, settings: Amount, text: Tensor | None, progress: Progress) -> Tensor:
        """Sequences of tokens, [n, length] int64.

        model: the float model, prepared by its adapter, with its weights
        text:  [m, length] windows of the calibration text, or None
        """
