"""Careless users: nothing of theirs is lost, and what they read says what to do."""

import errno
import os
import resource
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from qcore.calibration.images import ImageFile, Preprocessing
from qcore.checkpoint.journal import Journal
from qcore.cli import main
from qcore.cli._data import data_problems
from qcore.cli._models import Outline
from qcore.cli._replace import take_place
from qcore.cli._run_folder import running_into
from qcore.cli.compare import check_alike
from qcore.errors import CheckpointError, NotFound, PlanError
from qcore.evaluation.data import ImagePair
from qcore.plugins.shelf import Shelf
from qcore.recipe import Recipe

GREY = Preprocessing((1, 28, 28), (0.5,), (0.5,))
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


def test_plan_finds_all_that_is_wrong_at_once_and_data_too(run, registry, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà vu\n".encode("latin-1") * 999)
    done = run("plan", "toy:", "-r", "w4a16-gptq", "--set", "rules.0.granularity.size=7", "--calib", "gone.txt", "--eval", "latin.txt")
    assert done.code == 2 and "3 problems found before any computing" in done.err
    for why in ("group size 7 does not divide K=64", "text file gone.txt does not exist", "latin.txt is not UTF-8 text (byte 1"):
        assert why in done.err
    short = run("plan", "toy:", "-r", "w4a16-gptq", "--set", "calibration.samples=100000", "--eval-tokens", "1000000")
    assert short.code == 2 and "2 problems found" in short.err and "calib.txt is too short" in short.err and "eval.txt is too short" in short.err


def test_quantize_names_all_that_is_wrong_with_its_data_at_once(run, pretend) -> None:
    done = run("quantize", "toy:", "-r", "w4a16-gptq", "-o", "out", "--calib", "gone.txt", "--eval", "lost.txt", "--attribute")
    assert done.code == 2 and "2 problems found before any computing" in done.err and pretend.called == []
    assert "text file gone.txt does not exist" in done.err and "text file lost.txt does not exist" in done.err


def test_plan_estimates_the_memory_of_the_run_itself(run, pretend, tmp_path: Path) -> None:
    argv = ("toy:", "-r", "w4a16-rtn", "--max-ram", "1MiB", "--eval-tokens", "20000", "--window", "16")
    planned, refused = run("plan", *argv), run("quantize", *argv, "-o", "out")
    assert planned.code == refused.code == 2 and refused.err.strip() == planned.err.strip()


def test_a_dry_run_shows_the_plan_and_writes_nothing(run, pretend, tmp_path: Path) -> None:
    done = run(*GO, "out", "--dry-run")
    assert done.code == 0 and "left float" in done.out and pretend.called == [] and not list(tmp_path.glob("out*"))
    (tmp_path / "out").write_text("a file")
    assert run(*GO, "out", "--dry-run").code == 2


def test_the_version_is_told_without_loading_anything_heavy(run) -> None:
    import sys

    import qcore

    for flag in ("--version", "-V"):
        done = run(flag)
        assert done.code == 0 and done.out.startswith(f"qcore {qcore.__version__}, python {sys.version.split()[0]}, torch ")


def test_h_is_help_everywhere(run) -> None:
    for argv in (("-h",), ("plan", "-h"), ("recipes", "show", "-h")):
        done = run(*argv)
        assert done.code == 0 and done.out.startswith("Usage: qcore")


def test_a_tilde_is_the_home_folder_where_shells_leave_it_alone(run, pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run("quantize", "toy:", "-r", "w4a16-rtn", "--out=~/out", *SMALL).code == 0
    assert (tmp_path / "home/out/report.json").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("bits", ["inf", "-inf", "nan"])
def test_a_budget_is_finite(run, registry, bits: str) -> None:
    done = run("plan", "toy:", "-r", "w4a16-rtn", "--bits", bits)
    assert done.code == 2 and f"--bits {bits} is no budget; pass a number of bits per weight" in done.err


def test_an_empty_address_is_named(run, registry) -> None:
    done = run("plan", "", "-r", "w4a16-rtn")
    assert done.code == 2 and "the model's address is empty, got ''" in done.err


def test_an_adapter_that_does_not_understand_the_model_is_refused(run, registry) -> None:
    class Other(registry.adapters["toy"]):
        name = "other"

        def matches(self, model) -> bool:
            return False

    registry.adapters.add("other", Other, "qcore")
    for argv in (("plan", "toy:", "-r", "w4a16-rtn"), ("eval", "toy:")):
        done = run(*argv, "--adapter", "other")
        assert done.code == 2 and "--adapter other does not understand toy, a Toy; leave --adapter out, or take toy" in done.err


def test_what_cannot_be_compared_is_said_at_once_and_before_any_model_runs(run, registry) -> None:
    done = run("compare", "toy:", "toy:bare", "gone/", "--eval-tokens", "64")
    assert done.code == 2 and "cannot load model 'gone/'" in done.err and "float model" not in done.err


def test_models_of_other_data_or_context_are_not_compared() -> None:
    first = Outline("a", 2048, 1024, 256, "w1")
    others = [Outline("b", 50257, 1024, 256), Outline("c", None, None, 256), Outline("d", 2048, 128, 128), Outline("e", 2048, None, 512, "w2")]
    with pytest.raises(PlanError) as told:
        check_alike([first, *others], None, attribute=False)
    assert told.value.problems == (
        "b knows 50257 tokens, a knows 2048 tokens; compare models that read the same data and put out the same things",
        "c reads no text, a knows 2048 tokens; compare models that read the same data and put out the same things",
        "windows of 256 tokens are longer than what d can see, 128; pass --window 128 or less",
    )
    check_alike([first, others[2], others[3]], 128, attribute=False)
    check_alike([others[1], Outline("f", None, None, 256)], None, attribute=False)


def test_more_threads_than_the_machine_has_are_refused(run, registry) -> None:
    done = run("bench", "out", "--threads", "100000")
    assert done.code == 2 and f"--threads 100000 is more than this machine has, {os.cpu_count()}" in done.err


def test_a_nan_that_no_run_would_meet_is_found_before_the_work(run, pretend, registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without evaluation text nothing is computed with the head, which stays float: it would be written into the checkpoint."""
    source = registry.sources["toy"]

    class Spoilt(source):
        def load(self, uri: str):
            loaded = super().load(uri)
            loaded.reader["head.weight"][3, 4] = float("nan")
            return loaded

    registry.sources._items["toy"] = Spoilt
    done = run("quantize", "toy:bare", "-r", "w4a16-rtn", "-o", "out")
    assert done.code == 2 and "head.weight: 1 of 8192 values are NaN or infinite (first at (3, 4))" in done.err and pretend.called == []


def test_a_page_that_cannot_be_written_leaves_the_old_one(run, pretend, tmp_path: Path) -> None:
    assert run(*GO, "out").code == 0
    page = tmp_path / "out/report.html"
    before = page.read_text()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        done = run("report", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert done.code == 2 and "out/report.html cannot be written (File too large)" in done.err
    assert page.read_text() == before and sorted(p.name for p in page.parent.iterdir()) == ["model.safetensors", "report.html", "report.json"]
    assert run("report", "out").code == 0 and run("report", "out", "-o", "/dev/null").code == 0


def test_addresses_that_nothing_reads_come_with_what_was_meant(run, registry, tmp_path: Path) -> None:
    hub = run("plan", "meta-llama/Llama-3", "-r", "w4a16-rtn")
    assert hub.code == 2 and "hf download meta-llama/Llama-3 --local-dir Llama-3, then pass Llama-3/" in hub.err
    (tmp_path / "model").mkdir()
    assert "model is an empty folder" in run("plan", "model", "-r", "w4a16-rtn").err
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    done = run("plan", "model", "-r", "w4a16-rtn")
    assert done.code == 2 and "model holds no config.json, which says what its weights are of: fetch it too" in done.err


def test_a_disk_that_is_full_at_the_last_step_keeps_what_is_finished(run, pretend, tmp_path: Path) -> None:
    """`save` names the full disk itself, as a CheckpointError; the blocks are no less finished for that."""

    def full(name: str) -> None:
        if name == "save":
            (tmp_path / "out.run/block-00000.json").write_text("{}")
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as e:
                raise CheckpointError("cannot write the checkpoint") from e

    pretend._step = full
    done = run(*GO, "out")
    assert done.code == 2 and "No space left on device; nothing was written" in done.err and "with --resume goes on" in done.err
    assert (tmp_path / "out.run/block-00000.json").is_file()


def test_a_text_where_images_belong_is_found_by_the_plan(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no pixels")
    data = ImagePair(ImageFile(tmp_path / "text.txt", GREY), ImageFile(tmp_path / "gone", GREY), GREY)
    found = data_problems(None, Recipe(name="r", rules=(), solver=None), data, calibrates=True, eval_tokens=2, window=None)  # type: ignore[arg-type]
    assert len(found) == 2 and "text.txt" in found[0] and "gone does not exist" in found[1]


def test_a_file_that_is_not_there_is_a_mistake_for_a_recipe_without_data_too(tmp_path: Path) -> None:
    data = ImagePair(ImageFile(tmp_path / "lost", GREY), None, GREY)
    found = data_problems(None, Recipe(name="r", rules=(), solver=None), data, calibrates=False, eval_tokens=2, window=None)  # type: ignore[arg-type]
    assert found == [f"data file {tmp_path / 'lost'} does not exist; pass a path that exists"]


def test_a_part_of_a_name_is_understood() -> None:
    made = Shelf("recipes", list)
    for name in ("w4a16-rtn", "rtn-w8a8", "fp8"):
        made.add(name, name, "qcore")
    with pytest.raises(NotFound, match=r"no recipe named 'rtn'; did you mean 'rtn-w8a8' or 'w4a16-rtn'\?"):
        made["rtn"]


def test_a_plot_that_cannot_be_written_is_refused_before_the_work(run, registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    done = run("compare", "toy:", "toy:bare", "--plot", "x.svg")
    assert done.code == 2 and "--plot x.svg cannot be written there; name a file in a folder where you can write" in done.err
    assert "float model" not in done.err


@pytest.mark.parametrize("name", ["block-00000.safetensors", "block-00000.json", "run.json"])
def test_a_damaged_run_says_so_and_is_not_deleted(tmp_path: Path, name: str) -> None:
    journal = Journal(tmp_path / "out.run", {"a": 1})
    journal.finish_block(0, {"w": torch.ones(2)}, {"x": 1})
    journal.close()
    (tmp_path / "out.run" / name).write_text("{")
    with (
        pytest.raises(CheckpointError, match=r"delete .*out\.run and start again"),
        running_into(tmp_path / "out", {"a": 1}, resume=True) as (journal, _),
    ):
        journal.block(0)
    assert (tmp_path / "out.run" / name).read_text() == "{"


def test_runs_of_other_recipes_are_told_apart_by_their_lines(tmp_path: Path) -> None:
    Journal(tmp_path / "run", {"recipe": "bits = 4\nlong = 1\n"}).close()
    with pytest.raises(CheckpointError, match=r"recipe: the run has 'bits = 4', now 'bits = 3'$"):
        Journal(tmp_path / "run", {"recipe": "bits = 3\nlong = 1\n"})


def test_a_locale_without_the_signs_of_tables_still_gets_the_table(registry, monkeypatch: pytest.MonkeyPatch) -> None:
    out = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert main(["recipes", "list"]) == 0
    out.flush()
    assert b"w4a16-gptq" in out.buffer.getvalue()


def test_what_was_there_stays_where_the_new_folder_cannot_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    for folder, text in ((out, "old"), (new, "new")):
        folder.mkdir()
        (folder / "which").write_text(text)
    rename = Path.rename

    def refuses(self: Path, target: Path) -> Path:
        if self == new:
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuses)
        with pytest.raises(OSError, match="Permission"):
            take_place(new, out)
    assert (out / "which").read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]
    take_place(new, out)
    assert (out / "which").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]
