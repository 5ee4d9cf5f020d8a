"""Text for models that read bytes."""

from dataclasses import replace

import pytest
import torch
from qcore.errors import CalibrationError
from qcore.recipe import CalibrationSettings
from qplug_ssm.byte_texts import LENGTH, ByteTexts
from qplug_ssm.typeseg import to_bytes


@pytest.fixture
def files(tmp_path):
    for name, word in (("a.txt", "alpha"), ("b.txt", "beta")):
        (tmp_path / name).write_text("".join(f"{word} {i}\n" for i in range(3000)))
    return tmp_path / "a.txt", tmp_path / "b.txt"


def test_windows_are_bytes_of_the_files(files):
    data = ByteTexts(to_bytes).chosen(*files)
    batches, task = data.batches(CalibrationSettings(samples=4, length=32, batch=2)), data.task()
    assert [b["input_ids"].shape for b in batches] == [(2, 32)] * 2
    assert all(bytes(row.tolist()).decode() in files[0].read_text() for b in batches for row in b["input_ids"])
    assert all(bytes(row.tolist()).decode() in files[1].read_text() for row in task.batches[0])
    record = data.record(batches, task)
    assert record["calibration"]["tokens"] == 128 and record["evaluation"]["sha256"] == task.data()
    assert record["evaluation"]["windows"] * LENGTH <= len(files[1].read_text())


def test_of_one_text_the_last_part_is_held_out(files):
    data = ByteTexts(to_bytes).chosen(files[0], None)
    assert "the last 20 % of a.txt" in data.note()
    calibration, held_out = data.calibration.text(), data.evaluation.text()
    assert calibration + held_out == files[0].read_text()
    again = data.chosen(None, files[1])
    assert again.evaluation.path == files[1]


def test_it_is_what_the_command_line_asks_for(files):
    bare = ByteTexts(to_bytes)
    assert bare.task() is None and bare.batches(CalibrationSettings()) == [] and "pass --eval" in bare.note()
    assert replace(bare.chosen(*files), evaluation=None).task() is None  # as `verify --reproduce` wants it
    assert bare.record([], None) == {"calibration": None, "evaluation": None}


def test_the_same_and_too_short_texts_are_refused(files, tmp_path):
    with pytest.raises(CalibrationError, match="are the same"):
        ByteTexts(to_bytes).chosen(files[0], files[0])
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CalibrationError, match="shorter than one window of 256 bytes"):
        ByteTexts(to_bytes).chosen(None, tmp_path / "short.txt").task()


def test_every_run_compares_the_same_windows(files):
    one, two = (ByteTexts(to_bytes).chosen(*files).task() for _ in range(2))
    assert one.data() == two.data() and all(torch.equal(a, b) for a, b in zip(one.batches, two.batches, strict=True))
