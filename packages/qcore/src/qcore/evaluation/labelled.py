"""Labelled texts: what models that embed text, and give no logits over a vocabulary, are judged on."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qcore.calibration.text import TextFile, read_text, to_batches
from qcore.errors import CalibrationError
from qcore.evaluation.data import same_text, windows_record
from qcore.evaluation.task import Batch, Task

FORMAT = "one `label<TAB>text` a line"
TRAIN, TEST = 400, 300


class Labelled(Protocol):
    """Where labelled texts come from.

    name: what reports call it
    """

    @property
    def name(self) -> str: ...

    def read(self) -> list[tuple[str, str]]:
        """(label, text) of each; NotFound or CalibrationError where there are none."""


@dataclass(frozen=True)
class LabelledFile:
    """A UTF-8 file with one `label<TAB>text` a line; empty lines are passed over."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def read(self) -> list[tuple[str, str]]:
        found = []
        # not splitlines: it would break a text at form feeds and Unicode's line separators too
        for number, line in enumerate(read_text(self.path).split("\n"), 1):
            if not line.strip():
                continue
            label, tab, text = line.partition("\t")
            if not tab or not label.strip() or not text.strip():
                raise CalibrationError(f"{self.path}, line {number}: {line[:40]!r} is no labelled text; want {FORMAT}")
            found.append((label.strip(), text.strip()))
        return found


def dealt(pairs: Sequence[tuple[str, str]], train: int = TRAIN, test: int = TEST) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and test texts, dealt out by the SHA-256 of what each says: three tenths are the test, and copies count once.

    Of more than `train` or `test` texts, those with the smallest hashes are kept.  Where copies differ in their labels, the first one's counts.
    """
    marked: dict[str, tuple[str, str]] = {}
    for label, text in pairs:
        marked.setdefault(hashlib.sha256(" ".join(text.split()).lower().encode()).hexdigest(), (label, text))
    is_test = {mark: int(mark[:8], 16) % 10 < 3 for mark in marked}
    order = sorted(marked)
    return [marked[m] for m in order if not is_test[m]][:train], [marked[m] for m in order if is_test[m]][:test]


@dataclass(frozen=True)
class LabelledTexts:
    """The `ModelData` of models that embed text: calibrated on windows of plain text, judged by the labels of others.

    tokenizer: encodes calibration text, as `LoadedModel.tokenizer`
    encode:    token ids of one text to be judged, its special tokens included, cut to what the model is used with
    judge:     makes the task of (token ids of each text, [n] classes, how many of the texts, the first, are for training)
    around:    token ids that stand before and behind every text that the model is used with, and so every calibration window
    missing:   what to do where there are no labelled texts, for the report and errors
    """

    tokenizer: Any
    encode: Callable[[str], Sequence[int]]
    judge: Callable[[Sequence[Tensor], Tensor, int], Task]
    calibration: TextFile | None = None
    evaluation: Labelled | None = None
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    missing: str = f"pass a file of labelled texts with --eval, {FORMAT}"

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> "LabelledTexts":
        mine = replace(
            self,
            calibration=TextFile(calibration) if calibration else self.calibration,
            evaluation=LabelledFile(evaluation) if evaluation else self.evaluation,
        )
        if mine.calibration is not None and isinstance(mine.evaluation, LabelledFile) and same_text(mine.calibration.path, mine.evaluation.path):
            raise CalibrationError(
                f"calibration and evaluation text are the same: {mine.calibration.path} and {mine.evaluation.path}; "
                "a model looks better on text it was calibrated on. Pass another --calib, or leave it out where the model brings one"
            )
        return mine

    def batches(self, settings: Any) -> list[Batch]:
        """Windows of text, and no sequences of one token: those stand for the attention sinks of causal models, of which an encoder has none."""
        if self.calibration is None:
            return []
        before, behind = (torch.tensor(ids, dtype=torch.long).expand(settings.samples, -1) for ids in self.around)
        inner = settings.length - before.shape[1] - behind.shape[1]
        if inner < 1:
            raise CalibrationError(f"calibration.length={settings.length} leaves no room between the special tokens; take 64 or more")
        windows = self.calibration.windows(self.tokenizer, replace(settings, length=inner))
        return list(to_batches(torch.cat([before, windows, behind], dim=1), settings.batch))

    def task(self) -> Task | None:
        """CalibrationError where the texts are too few, or all of one label."""
        if self.evaluation is None:
            return None
        train, test = dealt(self.evaluation.read())
        classes = sorted({label for label, _ in (*train, *test)})
        if len(classes) < 2 or len(train) < 5 or not test:
            raise CalibrationError(
                f"{self.evaluation.name}: {len(train)} training and {len(test)} test texts with {len(classes)} labels (three tenths are dealt out as "
                "the test by their hashes, copies count once); there must be 5 to look up, one to judge, and two labels: pass more texts"
            )
        ids = [torch.tensor(list(self.encode(text)), dtype=torch.long) for _, text in (*train, *test)]
        return self.judge(ids, torch.tensor([classes.index(label) for label, _ in (*train, *test)]), len(train))

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        tested = f"not evaluated: there are no labelled texts; {self.missing}"
        if self.evaluation is not None:
            tested = f"judged by the labels of {self.evaluation.name}"
        if self.calibration is None or not calibrated:
            return f"no calibration data was needed, {tested}"
        return f"calibrated on {self.calibration.path.name}, {tested}"

    def record(self, batches: Sequence[Batch], task: Task | None) -> Mapping[str, Any]:
        """Of the calibration text: windows, tokens and sha256; of the labelled texts: how many, of how many labels, and sha256."""
        evaluation = None
        if task is not None and self.evaluation is not None:
            train, test = dealt(self.evaluation.read())
            labels = {label for label, _ in (*train, *test)}
            evaluation = {"file": self.evaluation.name, "training": len(train), "test": len(test), "labels": len(labels), "sha256": task.data()}
        return {"calibration": windows_record(self.calibration, batches), "evaluation": evaluation}
