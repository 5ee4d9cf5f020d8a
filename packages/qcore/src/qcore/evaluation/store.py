"""A float model's outputs on disk, so that the float model does not stay in memory.

A file of rows, written in order and read through a memory map.  It is written with plain writes: a full disk is then an OSError, where
a store into a memory map would kill the process.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qcore.errors import QcoreError

Precision = Literal["float32", "float16"]

# 4,096 tokens of a vocabulary of 50,000 take 0.8 GB as float32
LARGEST_FLOAT32 = 2**30


@dataclass(frozen=True)
class Reference:
    """The float model's outputs on a task's data.

    folder:    where they lie
    rows:      how many rows
    classes:   V, the length of each
    precision: "float32": the outputs themselves; "float16": their log-probabilities, whose rounding error is relative
               (so 2^-11 of a log-probability: some 0.001 for the likely tokens that carry the divergence)
    data:      sha256 of the data; a task refuses a reference of other data
    """

    folder: Path
    rows: int
    classes: int
    precision: Precision
    data: str

    def first(self, rows: int, data: str) -> "Reference":
        """The same file, of which only the first rows count.  data: sha256 of the data that they belong to"""
        return replace(self, rows=rows, data=data)

    def read(self, start: int, stop: int) -> Tensor:
        """Logits of rows start … stop - 1.  [n, V] float32"""
        mapped = np.memmap(self.folder / "outputs.bin", dtype=self.precision, mode="r", shape=(self.rows, self.classes))
        return torch.from_numpy(np.array(mapped[start:stop])).float()

    @classmethod
    def open(cls, folder: Path) -> "Reference":
        """The reference that `write_reference` left in `folder`."""
        try:
            meta = json.loads((folder / "reference.json").read_text())
            return cls(folder=folder, **meta)
        except (OSError, ValueError, TypeError) as e:
            raise QcoreError(f"{folder} holds no reference outputs ({e}); run the evaluation again") from e


def write_reference(folder: Path, outputs: Iterable[Tensor], rows: int, data: str, largest: int = LARGEST_FLOAT32) -> Reference:
    """Write outputs [T, V] that come one after another, `rows` rows in all; float16 where float32 would take more than `largest` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    classes, written = 0, 0
    precision: Precision = "float32"
    with open(folder / "outputs.bin", "wb") as file:
        for output in outputs:
            if not torch.isfinite(output).all():
                raise QcoreError(f"the float model's output is NaN or infinite at row {written} of the evaluation data; its weights are unusable")
            if not classes:
                classes = output.shape[-1]
                precision = "float32" if rows * classes * 4 <= largest else "float16"
            values = output.float() if precision == "float32" else torch.log_softmax(output.double(), -1).clamp(min=-65504.0).half()
            file.write(values.contiguous().numpy().tobytes())
            written += len(output)
    assert written == rows, (written, rows)
    reference = Reference(folder, rows, classes, precision, data)
    meta = {k: v for k, v in asdict(reference).items() if k != "folder"}
    (folder / "reference.json").write_text(json.dumps(meta, indent=2) + "\n")
    return reference
