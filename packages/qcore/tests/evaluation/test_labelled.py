"""Labelled texts as data: what is read, what is refused, how they are dealt out, and what a model is calibrated on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qcore.errors import CalibrationError, NotFound
from qcore.evaluation import Agreement, LabelledFile, LabelledTexts
from qcore.evaluation.labelled import dealt
from qcore.recipe import CalibrationSettings

PAIRS = [("even" if i % 2 == 0 else "odd", f"this is number {i}") for i in range(60)]


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) % 64 for c in text]


def judge(ids: object, labels: torch.Tensor, train: int) -> Agreement:
    return Agreement([i.unsqueeze(0) for i in ids[train:]], [label.view(1) for label in labels[train:]])


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def made(text: str, name: str = "labels.tsv") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return made


@pytest.fixture
def data(write: Callable[[str, str], Path]) -> LabelledTexts:
    bare = LabelledTexts(Letters(), lambda text: [1, *Letters().encode(text), 2], judge, around=((1,), (2, 3)))
    labels = write("".join(f"{label}\t{text}\n" for label, text in PAIRS), "labels.tsv")
    return bare.chosen(write("the quick brown fox " * 50, "calib.txt"), labels)


def test_the_order_of_a_file_says_nothing_and_no_text_is_in_both_parts() -> None:
    train, test = dealt(PAIRS)
    assert dealt(PAIRS[::-1]) == (train, test)
    assert sorted([*train, *test]) == sorted(PAIRS) and not set(train) & set(test)
    assert len(train) > len(test) > 5


def test_copies_count_once_whatever_their_blanks_and_capitals() -> None:
    copies = [(label, text.upper().replace(" ", "  ")) for label, text in PAIRS]
    assert dealt([*PAIRS, *copies]) == dealt(PAIRS)


def test_of_more_texts_the_same_ones_are_kept() -> None:
    train, test = dealt(PAIRS, train=10, test=4)
    assert (train, test) == (dealt(PAIRS)[0][:10], dealt(PAIRS)[1][:4])


def test_a_file_has_one_labelled_text_a_line(write) -> None:
    file = write("a\tone\ttwo\r\n\n b \tform\x0cfeed and line\u2028separator\n")
    assert LabelledFile(file).read() == [("a", "one\ttwo"), ("b", "form\x0cfeed and line\u2028separator")]


@pytest.mark.parametrize("line", ["no label at all", "\tno label", "no text\t "])
def test_a_line_that_is_none_is_named(write, line: str) -> None:
    with pytest.raises(CalibrationError, match=r"labels\.tsv, line 2: .* is no labelled text; want one `label<TAB>text` a line"):
        LabelledFile(write(f"a\tone\n{line}\n")).read()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nothing\.tsv does not exist"):
        LabelledFile(tmp_path / "nothing.tsv").read()


@pytest.mark.parametrize(("text", "says"), [("a\tone\nb\ttwo\n", "test texts"), ("".join(f"a\tnumber {i}\n" for i in range(60)), "with 1 labels")])
def test_too_few_texts_or_labels_are_refused(data: LabelledTexts, write, text: str, says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        data.chosen(None, write(text)).task()


def test_the_task_judges_the_test_texts_by_their_labels(data: LabelledTexts) -> None:
    task, (train, test) = data.task(), dealt(PAIRS)
    assert isinstance(task, Agreement) and len(task.batches) == len(test)
    assert task.batches[0].tolist() == [[1, *Letters().encode(test[0][1]), 2]]
    assert [int(label) for label in task.labels] == [["even", "odd"].index(label) for label, _ in test]
    record = data.record(data.batches(CalibrationSettings(samples=4, length=16, batch=2)), task)
    assert record["evaluation"] == {"file": "labels.tsv", "training": len(train), "test": len(test), "labels": 2, "sha256": task.data()}
    assert {k: record["calibration"][k] for k in ("file", "windows", "window", "tokens")} == {
        "file": "calib.txt", "windows": 4, "window": 16, "tokens": 64
    }  # fmt: skip


def test_calibration_windows_stand_between_the_special_tokens_and_are_of_the_asked_length(data: LabelledTexts) -> None:
    batches = data.batches(CalibrationSettings(samples=4, length=16, batch=2, starts=8))
    ids = torch.cat([b["input_ids"] for b in batches])
    assert [sorted(b) for b in batches] == [["input_ids"]] * 2  # no sequences of one token
    assert ids.shape == (4, 16) and ids[:, 0].eq(1).all() and ids[:, -2:].eq(torch.tensor([2, 3])).all()
    with pytest.raises(CalibrationError, match="leaves no room"):
        data.batches(CalibrationSettings(samples=4, length=3))


def test_calibrating_on_the_judged_texts_is_refused(data: LabelledTexts, write) -> None:
    labels = data.evaluation.path
    with pytest.raises(CalibrationError, match="are the same"):
        data.chosen(labels, labels)
    with pytest.raises(CalibrationError, match="are the same"):
        data.chosen(write(labels.read_text(), "copy.txt"), None)


def test_without_labelled_texts_the_note_says_what_to_do(data: LabelledTexts) -> None:
    bare = replace(data, evaluation=None, missing="install this, or pass that")
    assert bare.task() is None and bare.record([], None) == {"calibration": None, "evaluation": None}
    assert bare.note() == "calibrated on calib.txt, not evaluated: there are no labelled texts; install this, or pass that"
    assert data.note(calibrated=False) == "no calibration data was needed, judged by the labels of labels.tsv"
