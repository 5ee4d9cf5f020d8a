"""Text data: windows, seeds, and calibration kept apart from evaluation."""

from pathlib import Path

import pytest
import torch
from qcore.calibration.text import TextFile, data_hash, part
from qcore.errors import CalibrationError, NotFound
from qcore.evaluation.data import choose_text, default_window, evaluation_windows
from qcore.recipe import CalibrationSettings


class Letters:
    """One token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i:03}\n" for i in range(100)))  # 900 characters
    return path


def test_batches_have_one_shape_and_the_seed_chooses(text: Path) -> None:
    def batches(seed: int) -> list[torch.Tensor]:
        return [b["input_ids"] for b in TextFile(text).batches(Letters(), CalibrationSettings(samples=8, length=20, batch=4, seed=seed))]

    first, again, other = batches(0), batches(0), batches(1)
    assert [b.shape for b in first] == [(4, 20), (4, 20)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert data_hash(*first) == data_hash(*again) != data_hash(*other)


def test_windows_do_not_overlap_and_reach_over_the_whole_text(text: Path) -> None:
    windows = TextFile(text).windows(Letters(), CalibrationSettings(samples=45, length=20, batch=45))
    pieces = sorted("".join(map(chr, w)) for w in windows.tolist())
    whole = text.read_text()
    assert pieces == sorted(whole[i : i + 20] for i in range(0, 900, 20))


def test_held_out_parts_are_disjoint_and_make_the_whole(text: Path) -> None:
    pair = choose_text(text, None)
    assert pair.held_out and pair.calibration and pair.evaluation
    assert pair.calibration.text() + pair.evaluation.text() == text.read_text()
    assert pair.calibration.text().endswith("\n") and 0.15 < len(pair.evaluation.text()) / 900 < 0.25
    assert pair.note() == "calibrated on the first 80 % of text.txt, evaluated on the last 20 % of text.txt"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_a_cut_belongs_to_one_side_only(share: float) -> None:
    for text in ("no line end at all", "a\nb\nc\n", "x" * 50 + "\n", "ä\n" * 30):
        assert part(text, 0, share) + part(text, share, 1) == text


def test_files_that_the_source_brings_are_used_and_the_users_go_first(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 30)
    own = choose_text(None, None, text, other)
    assert own.calibration == TextFile(text) and own.evaluation == TextFile(other) and not own.held_out
    mine = choose_text(other, None, text, text)
    assert mine.calibration and mine.calibration.path == other and mine.held_out  # the source's evaluation text is of another kind
    assert choose_text(other, text).note() == "calibrated on other.txt, evaluated on text.txt"
    assert choose_text(None, text).calibration is None


def test_evaluating_on_the_calibration_text_is_refused(text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    for same in (text, copy):
        with pytest.raises(CalibrationError, match=r"calibration and evaluation text are the same: .*text\.txt and .*; .* leave --eval out"):
            choose_text(text, same)


def test_a_text_that_is_too_short_says_found_needed_and_what_to_pass(text: Path) -> None:
    with pytest.raises(CalibrationError, match=r"text\.txt is too short: 900 tokens found, 1280 needed \(64 .*calibration\.samples=40"):
        TextFile(text).batches(Letters(), CalibrationSettings(samples=64, length=20))
    with pytest.raises(CalibrationError, match=r"900 tokens found, 4096 needed .*calibration\.length=450"):
        TextFile(text).batches(Letters(), CalibrationSettings(samples=2, length=2048))
    with pytest.raises(CalibrationError, match=r"\(its part from 80% to 100%\) is too short: 180 tokens found, 400 needed .*--eval-tokens 160"):
        evaluation_windows(TextFile(text, start=0.8), Letters(), 400, 40)


def test_the_settings_that_an_error_proposes_work(text: Path) -> None:
    assert len(TextFile(text).batches(Letters(), CalibrationSettings(samples=40, length=20))) == 5
    assert evaluation_windows(TextFile(text, start=0.8), Letters(), 160, 40).shape == (4, 40)


def test_empty_missing_binary_and_folder_are_named(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"abc\xff\xfe")
    for path, error, message in (
        (empty, CalibrationError, r"empty\.txt is empty; pass a text"),
        (binary, CalibrationError, r"binary\.txt is not UTF-8 text \(byte 3"),
        (tmp_path / "none.txt", NotFound, r"none\.txt does not exist; pass the path"),
        (tmp_path, NotFound, "is a folder; pass the path"),
    ):
        with pytest.raises(error, match=message):
            TextFile(path).text()


def test_a_model_without_tokenizer_cannot_read_text(text: Path) -> None:
    with pytest.raises(CalibrationError, match="this model has no tokenizer"):
        TextFile(text).tokens(None)


def test_samples_that_do_not_fill_batches_are_refused(text: Path) -> None:
    with pytest.raises(CalibrationError, match=r"10 windows do not fill batches of 8.*calibration\.samples=8"):
        TextFile(text).batches(Letters(), CalibrationSettings(samples=10, length=20, batch=8))
    assert TextFile(text).batches(Letters(), CalibrationSettings(samples=4, length=20, batch=8))[0]["input_ids"].shape == (4, 20)


def test_default_window_follows_size_and_context() -> None:
    assert (default_window(5_000_000), default_window(135_000_000), default_window(135_000_000, 128)) == (256, 512, 128)
