"""Careless users: nothing of theirs is lost, and what they read says what to do."""

import errno
import os
from pathlib import Path

import pytest

SMALL = ("--eval-tokens", "64", "--window", "16")
GO = ("quantize", "toy:", "-r", "w4a16-rtn", *SMALL, "-o")


def test_force_deletes_no_folder_that_no_run_wrote(run, pretend, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("dear")
    done = run(*GO, "out", "--force")
    assert done.code == 2 and "-o out holds thesis.txt and neither qcore.json nor report.json: no run wrote it" in done.err
    assert (tmp_path / "out/thesis.txt").read_text() == "dear" and pretend.called == []


@pytest.mark.parametrize("out", [".", "", "/"])
def test_force_deletes_neither_the_working_folder_nor_the_root(run, pretend, tmp_path: Path, out: str) -> None:
    (tmp_path / "report.json").write_text("{}")
    done = run(*GO, out, "--force")
    assert done.code == 2 and "has no name of its own; name a folder" in done.err
    assert (tmp_path / "report.json").exists() and pretend.called == []


def test_force_deletes_nothing_that_the_run_reads(run, pretend, texts: Path, tmp_path: Path) -> None:
    (texts / "report.json").write_text("{}")
    done = run(*GO, "texts", "--force", "--eval", texts / "eval.txt")
    assert done.code == 2 and f"-o texts --force would delete {texts / 'eval.txt'}, which this run needs" in done.err
    inside = run(*GO, tmp_path.parent, "--force")
    assert inside.code == 2 and tmp_path.exists() and pretend.called == []


def test_a_folder_of_the_users_beside_the_target_is_not_taken_for_a_run(run, pretend, tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run/dear.txt").write_text("dear")
    done = run(*GO, "out")
    assert done.code == 2 and "out.run beside out is where a run into it works, and no run made it" in done.err
    assert (tmp_path / "out.run/dear.txt").read_text() == "dear"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link_and_what_it_points_to_is_written(run, pretend, tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert run(*GO, "out").code == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/report.json").is_file()
    assert run(*GO, "out", "--force").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out", "texts"]


def test_a_target_inside_a_file_is_refused_before_the_model_is_read(run, pretend, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("a file")
    done = run(*GO, "note/deep/out")
    assert done.code == 2 and f"-o note/deep/out would lie in {tmp_path / 'note'}, which is a file" in done.err and done.out == ""


def test_a_mount_point_is_refused_before_the_model_is_read(run, pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda p: Path(p) == tmp_path / "out")
    done = run(*GO, "out")
    assert done.code == 2 and "-o out is a mount point" in done.err and "name a folder inside it: -o out/out" in done.err and done.out == ""


def test_a_place_where_nothing_can_be_made_is_named(run, pretend) -> None:
    done = run(*GO, "/proc/out")
    assert done.code == 2 and "-o /proc/out: the run cannot work in /proc/out.run" in done.err and pretend.called == []


def test_a_disk_that_is_full_after_some_blocks_says_that_they_are_kept(run, pretend, tmp_path: Path) -> None:
    def full(name: str) -> None:
        if name == "save":
            (tmp_path / "out.run/block-00000.json").write_text("{}")
            raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    pretend._step = full
    done = run(*GO, "out")
    assert done.code == 2 and "No space left on device (model.safetensors); nothing was written" in done.err
    assert "1 blocks are finished: mend that, and the same command with --resume goes on" in done.err and (tmp_path / "out.run").is_dir()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EBUSY, errno.EIO])
def test_a_path_that_fails_in_an_unusual_way_is_a_message(run, pretend, number: int) -> None:
    pretend.fail["load"] = OSError(number, os.strerror(number), "some/where")
    done = run(*GO, "out")
    assert done.code == 2 and f"error: {os.strerror(number)} (some/where); check the path and the disk" in done.err
