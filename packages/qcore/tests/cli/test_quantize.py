"""`qcore quantize`: what it writes when all goes well, and that nothing is left when anything does not."""

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest

SMALL = (
    "--set",
    "calibration.samples=8",
    "--set",
    "calibration.length=64",
    "--set",
    "calibration.starts=0",
    "--eval-tokens",
    "512",
    "--window",
    "64",
)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_it_writes_a_checkpoint_with_its_report_and_shows_the_figures(run, pretend, tmp_path: Path) -> None:
    done = run("quantize", "toy:", "--recipe", "w4a16-gptq", "-o", "out", *SMALL)
    assert done.code == 0, done.err
    assert pretend.called == ["float_forward", "quantize_model", "save", "prove", "load"]
    assert files(tmp_path / "out") == ["model.safetensors", "report.html", "report.json"]
    assert [b["input_ids"].shape for b in pretend.batches] == [(8, 64)]
    for figure in ("size of weights", "effective bits", "perplexity", "KL divergence", "top-1 agreement", "seconds", "peak memory"):
        assert figure in done.out, figure
    for line in ("its weights are random", "a note of the run", "calibrated on calib.txt, evaluated on eval.txt", "written: out/"):
        assert line in done.out, line
    assert "block: 1/1" in done.err and "evaluate: 8/8" in done.err
    assert files(tmp_path) == ["out", "texts"]  # neither the partial folder nor the reference is left


def test_the_report_has_one_schema_and_says_what_was_measured(run, pretend, tmp_path: Path) -> None:
    done = run("quantize", "toy:", "--recipe", "w4a16-gptq", "-o", "out", "--json", *SMALL)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert done.json == report and report["schema"] == 1
    assert list(report) == [
        "schema", "kl", "kernels", "model", "recipe", "data", "size", "quality", "sites", "left_float", "refused", "coverage", "seconds", "phases",
        "memory", "proof",
        "versions", "threads", "histograms", "attribution",
    ]  # fmt: skip
    assert report["recipe"]["name"] == "w4a16-gptq" and "calibration.samples=8" in report["recipe"]["overrides"]
    assert 'name = "gptq"' in report["recipe"]["toml"] and "samples = 8" in report["recipe"]["toml"]
    scores = report["quality"]["scores"]
    assert report["kl"] == scores["kl"]
    assert scores["tokens"] == 8 * 63 and scores["kl"] > 0 and scores["perplexity"] > 1
    assert report["quality"]["reference_precision"] == "float32"
    assert report["size"]["effective_bits"] == pytest.approx(8 * 2304 / 64**2)
    assert report["size"]["before_bytes"] == 4 * (128 * 64 * 2 + 64 * 64)
    assert report["size"]["after_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert report["data"]["calibration"]["tokens"] == 512 and len(report["data"]["evaluation"]["sha256"]) == 64
    assert report["memory"]["peak_bytes"] > report["memory"]["anonymous_bytes"] > 0
    assert {"reference", "quantize", "evaluate"} <= set(report["memory"]["anonymous_by_phase"])
    assert report["proof"]["level"] == "identical" and report["sites"][0]["site"] == "mix:weight"


def test_the_same_run_gives_the_same_report_but_for_time_and_memory(run, pretend) -> None:
    first, second = (run("quantize", "toy:", "-r", "w4a16-gptq", "-o", f"out{i}", "--json", *SMALL).json for i in (1, 2))
    for key in set(first) - {"seconds", "memory", "phases"}:
        assert first[key] == second[key], key


def test_with_calib_alone_the_last_fifth_is_held_out(run, pretend, texts: Path) -> None:
    done = run("quantize", "toy:bare", "-r", "w4a16-gptq", "-o", "out", "--calib", texts / "calib.txt", *SMALL)
    assert done.code == 0 and "calibrated on the first 80 % of calib.txt, evaluated on the last 20 % of calib.txt" in done.out


def test_a_recipe_that_needs_no_data_gets_none(run, pretend) -> None:
    done = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", *SMALL)
    assert done.code == 0 and pretend.batches == [] and "no calibration data was needed, evaluated on eval.txt" in done.out


def test_without_any_text_it_quantizes_and_says_that_it_did_not_evaluate(run, pretend, tmp_path: Path) -> None:
    done = run("quantize", "toy:bare", "-r", "w4a16-rtn", "-o", "out")
    assert done.code == 0 and "not evaluated: there is no evaluation text, pass --eval" in done.out
    assert json.loads((tmp_path / "out/report.json").read_text())["quality"] is None


def test_json_prints_json_alone_on_stdout(run, pretend) -> None:
    done = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", "--json", *SMALL)
    assert done.json["model"]["name"] == "toy" and "toy, recipe w4a16-rtn" in done.err  # the plan goes to stderr


# what the user can mend -------------------------------------------------------------------------------------------------------------------

BAD = {
    "an unknown recipe": (["toy:", "-r", "w4a16-gtpq"], r"no recipe named 'w4a16-gtpq'; did you mean 'w4a16-gptq'"),
    "an unknown format": (["toy:", "-r", "w4a16-rtn", "--set", "rules.0.format.name=imt"], "no format named 'imt'; did you mean 'int'"),
    "a group that does not divide": (
        ["toy:", "-r", "w4a16-rtn", "--set", "rules.0.granularity.size=48"],
        "mix:weight: group size 48 does not divide K=64; use granularity 'channel', or a divisor of 64: 32, 64",
    ),
    "a pattern that matches nothing": (
        ["toy:", "-r", "w4a16-rtn", "--set", "rules.0.sites='*.mx:weight'"],
        "the pattern '*.mx:weight' matches none of the 2 sites of toy; sites look like mix:weight",
    ),
    "an unknown option": (["toy:", "-r", "w4a16-gptq", "--set", "solver.damping=1"], "solver 'gptq' has no field 'damping'; did you mean 'damp'?"),
    "an unknown model": (["zoo:nothing", "-r", "w4a16-rtn"], "no installed source knows the prefix 'zoo'; for zoo: models: pip install qzoo"),
    "a missing model": (["nowhere/", "-r", "w4a16-rtn"], "no such file or folder\nwhat can be loaded:\n  toy:NAME"),
    "a missing recipe file": (["toy:", "-r", "my.toml"], "no recipe file my.toml; give a path that exists, or a recipe's name: "),
    "a missing text": (["toy:", "-r", "w4a16-gptq", "--calib", "no.txt"], "text file no.txt does not exist; pass the path of a UTF-8 text file"),
    "no calibration data": (
        ["toy:bare", "-r", "w4a16-gptq"],
        "recipe 'w4a16-gptq' looks at calibration data, and there is none; pass --calib text.txt",
    ),
    "an unknown adapter": (["toy:", "-r", "w4a16-rtn", "--adapter", "toi"], "no adapter named 'toi'; did you mean 'toy'?"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_with_two_names_the_place_and_writes_nothing(run, pretend, tmp_path: Path, argv: list[str], message: str) -> None:
    done = run("quantize", *argv, "-o", "out")
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert files(tmp_path) == ["texts"] and pretend.called == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "calib.txt is empty; pass a text"),
        ("too short\n" * 20, r"tokens found, 512 needed (8 windows of 64); pass a longer text, or --set calibration."),
        (b"\xff\xfe\x00", "is not UTF-8 text (byte 0"),
    ],
)
def test_text_that_cannot_calibrate_is_named(run, pretend, tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "calib.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = run("quantize", "toy:", "-r", "w4a16-gptq", "-o", "out", "--calib", path, *SMALL)
    assert done.code == 2 and message in done.err and not (tmp_path / "out").exists() and pretend.called == []


def test_windows_longer_than_the_models_context_are_refused(run, pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("qcore.plan", "qcore.plan.planner"):
        monkeypatch.setattr(f"{place}.context_length", lambda model: 32)
    calibration = run("quantize", "toy:", "-r", "w4a16-gptq", "-o", "out", *SMALL)
    assert (
        calibration.code == 2 and "calibration.length=64 is longer than what toy can see, 32 tokens; --set calibration.length=32" in calibration.err
    )
    window = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", "--window", "64")
    assert window.code == 2 and "--window 64 is longer than what the model can see, 32 tokens; pass --window 32" in window.err


def test_calibrating_and_evaluating_on_one_text_is_refused(run, pretend, texts: Path) -> None:
    same = texts / "calib.txt"
    done = run("quantize", "toy:", "-r", "w4a16-gptq", "-o", "out", "--calib", same, "--eval", same)
    assert done.code == 2 and "calibration and evaluation text are the same" in done.err and pretend.called == []


def test_a_folder_that_is_not_empty_is_kept_unless_forced(run, pretend, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text("{}")
    (tmp_path / "out/older.txt").write_text("of an older run")
    done = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", *SMALL)
    assert done.code == 2 and "-o out is not empty; name another folder, or pass --force" in done.err
    assert files(tmp_path / "out") == ["older.txt", "report.json"]
    assert run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", "--force", *SMALL).code == 0
    assert files(tmp_path / "out") == ["model.safetensors", "report.html", "report.json"] and files(tmp_path) == ["out", "texts"]


def test_a_target_that_is_a_file_is_refused(run, pretend, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    done = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out")
    assert done.code == 2 and "-o out is a file; name a folder" in done.err


def test_a_checkpoint_that_reopens_as_another_model_is_not_kept(run, pretend, tmp_path: Path) -> None:
    pretend.level = "different"
    done = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", *SMALL)
    assert done.code == 2 and "loads with pretend.load, but its outputs differ from the saved model's by 0.25" in done.err
    assert files(tmp_path) == ["texts"]


@pytest.mark.parametrize("step", ["float_forward", "quantize_model", "save", "prove", "load"])
def test_ctrl_c_at_any_step_leaves_nothing_and_ends_with_130(run, pretend, tmp_path: Path, step: str) -> None:
    pretend.fail[step] = KeyboardInterrupt()
    done = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "deep/out", *SMALL)
    assert done.code == 130 and f"interrupted; nothing was written in {tmp_path}/deep/out/" in done.err
    assert "Traceback" not in done.err and files(tmp_path) == ["texts"]


def test_a_polite_kill_cleans_up_too(run, pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretend, "prove", lambda *a, **b: os.kill(os.getpid(), signal.SIGTERM))
    done = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", *SMALL)
    assert done.code == 130 and files(tmp_path) == ["texts"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_is_named_and_leaves_nothing(run, pretend, tmp_path: Path) -> None:
    pretend.fail["save"] = OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")
    done = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", *SMALL)
    assert done.code == 2 and "No space left on device (out/model.safetensors); nothing was written; free some space" in done.err
    assert files(tmp_path) == ["texts"]


def test_a_file_that_cannot_grow_is_named_and_leaves_nothing(run, pretend, tmp_path: Path) -> None:
    # the limit on a file's size stands in for a full disk: the write itself fails
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        done = run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.code == 2 and "File too large; nothing was written; free some space, or choose another folder with -o" in done.err
    assert files(tmp_path) == ["texts"]


def test_an_old_result_survives_a_run_that_fails(run, pretend, tmp_path: Path) -> None:
    assert run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", *SMALL).code == 0
    before = (tmp_path / "out/report.json").read_bytes()
    pretend.fail["load"] = KeyboardInterrupt()
    assert run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", "--force", *SMALL).code == 130
    assert (tmp_path / "out/report.json").read_bytes() == before and files(tmp_path) == ["out", "texts"]


def test_a_defect_of_ours_shows_its_traceback_and_leaves_nothing(run, pretend, tmp_path: Path) -> None:
    pretend.fail["quantize_model"] = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError, match="ours"):
        run("quantize", "toy:", "-r", "w4a16-rtn", "-o", "out", *SMALL)
    assert files(tmp_path) == ["texts"]


def test_qcore_debug_shows_the_traceback_of_a_users_error(run, pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcore.errors import NotFound

    monkeypatch.setenv("QCORE_DEBUG", "1")
    with pytest.raises(NotFound):
        run("quantize", "toy:", "-r", "nothing", "-o", "out")


def test_a_selector_chooses_the_calibration_text(run, pretend, registry) -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    import torch

    @dataclass(frozen=True)
    class Longest:
        """The samples with the largest norm, shortest first where turned round."""

        name: ClassVar[str] = "longest"
        turned: bool = False

        def select(self, embeddings, k, scores=None):
            order = embeddings.sum(1).argsort(stable=True).tolist()
            return (order if self.turned else order[::-1])[:k]

    registry.selectors.add("longest", Longest, "qplug-longest")
    recipe, seen = ("quantize", "toy:", "-r", "w4a16-gptq"), {}
    turned = ("--select", "longest", "--set", "calibration.select.turned=true")
    for out, extra in (("plain", ()), ("chosen", ("--select", "longest")), ("turned", turned)):
        assert run(*recipe, "-o", out, *extra).code == 0
        seen[out] = torch.cat([b["input_ids"] for b in pretend.batches if b["input_ids"].shape[1] > 1])
    assert seen["plain"].shape == seen["chosen"].shape
    assert not torch.equal(seen["plain"], seen["chosen"]) and not torch.equal(seen["chosen"], seen["turned"])
    wrong = run(*recipe, "-o", "wrong", "--select", "longst")
    assert wrong.code == 2 and "did you mean 'longest'" in wrong.err
