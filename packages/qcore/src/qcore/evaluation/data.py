"""Evaluation text, and how it is kept apart from calibration text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qcore.calibration.text import TextFile, cut, read_text
from qcore.errors import CalibrationError

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
    if _same_text(calibration, test):
        raise CalibrationError(
            f"calibration and evaluation text are the same: {calibration} and {test}; a model looks better on text it was calibrated on. "
            "Pass another --eval, or leave --eval out: then the last 20 % of --calib is held out"
        )
    return TextPair(TextFile(calibration), TextFile(test))


def _same_text(a: Path, b: Path) -> bool:
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
