"""Text for classifiers that read its bytes: windows of one text to calibrate on, of another to compare with the float model on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from qcore.calibration.text import Amount, TextFile, cut
from qcore.errors import CalibrationError
from qcore.evaluation import Agreement, TextPair, choose_text, windows_record
from qcore.evaluation.task import Task

LENGTH, WINDOWS, BATCH = 256, 64, 8


@dataclass(frozen=True)
class ByteTexts:
    """The `ModelData` of models that label bytes: compared with their float self, for no text here has labels.

    encode:   what the model reads of a text
    held_out: calibration and evaluation are parts of one file
    """

    encode: Callable[[str], list[int]]
    calibration: TextFile | None = None
    evaluation: TextFile | None = None
    held_out: bool = False

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> "ByteTexts":
        """As for language models: of a --calib without --eval the last 20 % are kept for the comparison."""
        own = [text.path if text is not None else None for text in (self.calibration, self.evaluation)]
        pair = choose_text(calibration, evaluation, *own)
        return ByteTexts(self.encode, pair.calibration, pair.evaluation, pair.held_out)

    def batches(self, settings: Amount) -> list[Any]:
        # with its `encode`, this object is the tokenizer that a text file asks for
        return [] if self.calibration is None else list(self.calibration.batches(self, settings))

    def task(self) -> Task | None:
        """Agreement on up to 64 windows of 256 bytes, drawn with seed 0 from the whole text; CalibrationError where it is shorter than one."""
        if self.evaluation is None:
            return None
        there = cut(self.evaluation.tokens(self), LENGTH)
        if not len(there):
            short = f"evaluation text {self.evaluation.path} is shorter than one window of {LENGTH} bytes"
            raise CalibrationError(f"{short}; pass a longer one with --eval")
        order = torch.randperm(len(there), generator=torch.Generator().manual_seed(0))
        return Agreement(list(there[order[:WINDOWS]].split(BATCH)))

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        return TextPair(self.calibration, self.evaluation, self.held_out).note(calibrated=calibrated, source=source)

    def record(self, batches: Sequence[Any], task: Task | None) -> Mapping[str, Any]:
        evaluation = None
        if isinstance(task, Agreement) and self.evaluation is not None:
            evaluation = {
                "file": self.evaluation.path.name,
                "part": [self.evaluation.start, self.evaluation.stop],
                "windows": sum(map(len, task.batches)),
                "window": LENGTH,
                "sha256": task.data(),
            }
        return {"calibration": windows_record(self.calibration, batches), "evaluation": evaluation}
