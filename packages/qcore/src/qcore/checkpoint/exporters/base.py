"""What an exporter is."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Exported:
    """What was written.

    file:  the file that the other program opens
    notes: what in it is not as in the checkpoint, one sentence each
    """

    file: Path
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """Writes a quantized model for another program; an exporter is its own config.

    name:   lower case
    suffix: of the file, ".onnx"
    """

    name: ClassVar[str]
    suffix: ClassVar[str]

    def refuses(self, model: nn.Module) -> list[str]:
        """Every reason why this model cannot be written; empty where it can."""

    def write(self, model: nn.Module, file: Path, example: Tensor) -> Exported:
        """Write `model`, which runs, to `file`.  example: an input, for the ranks and sizes of the program's interface

        SpecError with every reason of `refuses`.
        """
