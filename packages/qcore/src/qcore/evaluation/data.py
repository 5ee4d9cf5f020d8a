"""Calibration and evaluation data of one run, texts or images, and how they are kept apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor

from qcore.calibration.images import ImageFile, Preprocessing
from qcore.calibration.text import Amount, TextFile, cut, data_hash, read_text
from qcore.errors import CalibrationError
from qcore.evaluation.images import ImageClassification
from qcore.evaluation.task import Batch, Task, tensors_of

# of a text that is all there is: the first 80 % calibrate, the last 20 % evaluate
HELD_OUT = 0.8


@dataclass(frozen=True)
class TextPair:
    """Where calibration text and evaluation text come from; None = there is none.

    held_out: both are parts of one file
    """

    calibration: TextFile | None
    evaluation: TextFile | None
    held_out: bool = False

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        """One sentence for the report.

        calibrated: whether the recipe looked at calibration data at all
        source:     what made the data with the model, "" = it was read
        """
        test = self.evaluation.path.name if self.evaluation else None
        if self.held_out:
            test = f"the last 20 % of {test}"
        tested = f"evaluated on {test}" if test else "not evaluated: there is no evaluation text, pass --eval"
        if source and calibrated:
            return f"calibrated on what {source} made with the float model, {tested}"
        if self.calibration is None or not calibrated:
            return f"no calibration data was needed, {tested}"
        return f"calibrated on {'the first 80 % of ' if self.held_out else ''}{self.calibration.path.name}, {tested}"


def choose_text(calib: Path | None, evaluation: Path | None, own_calib: Path | None = None, own_evaluation: Path | None = None) -> TextPair:
    """What the user passed, else what the model's source brings, else the last 20 % of the calibration text for evaluation.

    A model is never evaluated on the text it was calibrated on: the same file twice is a CalibrationError.
    """
    calibration = calib or own_calib
    # evaluation text that the source brings goes with its calibration text; with the user's own it would be of another kind
    test = evaluation or (own_evaluation if calib is None else None)
    if calibration is None:
        return TextPair(None, TextFile(test) if test else None)
    if test is None:
        return TextPair(TextFile(calibration, stop=HELD_OUT), TextFile(calibration, start=HELD_OUT), held_out=True)
    if same_text(calibration, test):
        raise CalibrationError(
            f"calibration and evaluation text are the same: {calibration} and {test}; a model looks better on text it was calibrated on. "
            "Pass another --eval, or leave --eval out: then the last 20 % of --calib is held out"
        )
    return TextPair(TextFile(calibration), TextFile(test))


def same_text(a: Path, b: Path) -> bool:
    """Whether two paths are one file, or two with the same text in them."""
    return a.exists() and b.exists() and (a.samefile(b) or read_text(a) == read_text(b))


def evaluation_windows(text: TextFile, tokenizer: Any, tokens: int, length: int) -> Tensor:
    """The first windows of a text, `tokens` tokens in all.  → [tokens // length, length]; CalibrationError when the text is too short"""
    count = max(tokens // length, 1)
    ids = text.tokens(tokenizer)
    windows = cut(ids, length)[:count]
    if len(windows) < count:
        part = "" if text.start == 0 and text.stop == 1 else f" (its part from {text.start:.0%} to {text.stop:.0%})"
        fits = f"--eval-tokens {len(windows) * length}" if len(windows) else f"--window {max(len(ids) // 2, 2)}"
        raise CalibrationError(
            f"evaluation text {text.path}{part} is too short: {len(ids)} tokens found, {count * length} needed "
            f"({count} windows of {length}); pass a longer text with --eval, or {fits}"
        )
    return windows


def default_window(parameters: int, context: int | None = None) -> int:
    """Tokens of one window: 256 for models under 20 million parameters, else 512; never more than the model's context."""
    usual = 256 if parameters < 20_000_000 else 512
    return min(usual, context) if context else usual


class ModelData(Protocol):
    """Data that a model's source brings along, for models that do not read text: `LoadedModel.data`.

    `ImagePair` is one; a plug-in whose models read point clouds brings another.
    """

    @property
    def calibration(self) -> Any:
        """Where calibration data comes from; None = there is none."""

    @property
    def evaluation(self) -> Any:
        """Where evaluation data comes from; None = there is none."""

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> Self:
        """The same with the user's own files, where there are any; CalibrationError where one file is to serve both."""

    def batches(self, settings: Amount) -> list[Batch]:
        """Calibration batches."""

    def task(self) -> Task | None:
        """What the float model and the quantized one are compared on; None without evaluation data."""

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        """One sentence for the report."""

    def record(self, batches: Sequence[Batch], task: Task | None) -> Mapping[str, Any]:
        """ "calibration" and "evaluation" for the report: how much of what, and its sha256; None where there was none."""


@dataclass(frozen=True)
class ImagePair:
    """Where images to calibrate and to evaluate on come from; None = there are none.

    preprocessing: what the model wants, for files that the user passes
    """

    calibration: ImageFile | None
    evaluation: ImageFile | None
    preprocessing: Preprocessing

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> "ImagePair":
        mine = replace(
            self,
            calibration=ImageFile(calibration, self.preprocessing) if calibration else self.calibration,
            evaluation=ImageFile(evaluation, self.preprocessing) if evaluation else self.evaluation,
        )
        a, b = mine.calibration, mine.evaluation
        if a is not None and b is not None and a.path.exists() and b.path.exists() and a.path.samefile(b.path):
            raise CalibrationError(
                f"calibration and evaluation images are the same: {a.path} and {b.path}; a model looks better on images it was calibrated on. "
                "Pass another --eval"
            )
        return mine

    def batches(self, settings: Amount) -> list[Batch]:
        return [] if self.calibration is None else list(self.calibration.batches(settings))

    def task(self) -> Task | None:
        if self.evaluation is None:
            return None
        pixels, labels = self.evaluation.read()
        return ImageClassification(pixels, self.preprocessing, labels)

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        tested = f"evaluated on {_named(self.evaluation)}" if self.evaluation else "not evaluated: there are no evaluation images, pass --eval"
        used = self.calibration is not None and calibrated
        return f"calibrated on {_named(self.calibration)}, {tested}" if used else f"no calibration data was needed, {tested}"

    def record(self, batches: Sequence[Batch], task: Task | None) -> Mapping[str, Any]:
        """Of both: the file, the number of images, their shape as the model reads them, and sha256."""
        images = [t for batch in batches for t in tensors_of(batch)]
        calibration = None
        if images and self.calibration is not None:
            calibration = self._entry(self.calibration, sum(len(t) for t in images), tuple(images[0].shape[1:]), lambda: data_hash(*images))
        evaluation = None
        if isinstance(task, ImageClassification) and self.evaluation is not None:
            evaluation = self._entry(self.evaluation, len(task.pixels), self.preprocessing.size, task.data)
        return {"calibration": calibration, "evaluation": evaluation}

    def _entry(self, file: ImageFile, count: int, shape: tuple[int, ...], digest: Callable[[], str]) -> dict[str, Any]:
        return {"file": file.path.name, "images": count, "shape": list(shape), "sha256": digest()}


def choose_data(loaded: Any, calib: Path | None, evaluation: Path | None) -> Any:
    """The data of a run: what the model's source brings (a `ModelData`), or texts; the user's own files come first.  loaded: a `LoadedModel`"""
    if loaded.data is not None:
        return loaded.data.chosen(calib, evaluation)
    return choose_text(calib, evaluation, loaded.calibration, loaded.evaluation)


def _named(file: ImageFile | None) -> str:
    assert file is not None
    return f"images of {file.path.parent.name}/{file.path.name}"


def windows_record(text: TextFile | None, batches: Sequence[Batch]) -> dict[str, Any] | None:
    """What a report says of calibration text: the file, how many windows and tokens, and their sha256; None where there was none."""
    windows = [batch["input_ids"] for batch in batches]
    if text is None or not windows:
        return None
    return {
        "file": text.path.name,
        "part": [text.start, text.stop],
        "windows": sum(map(len, windows)),
        "window": windows[0].shape[1],
        "tokens": sum(w.numel() for w in windows),
        "sha256": data_hash(*windows),
    }


def inputs_of(batch: Batch) -> list[Tensor]:
    """The tensors by which calibration data is named: a text's token ids, or all that the model reads."""
    return [batch["input_ids"]] if isinstance(batch, dict) and "input_ids" in batch else list(tensors_of(batch))
