"""The main job on a model that ships with the workspace, through the command line, with everything real; and what it says of broken input."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import qzoo
import torch
from qcore.cli import main
from safetensors.torch import load_file, save_file

TINY = Path(qzoo.__file__).parent / "data/tiny-llama"
TEXT = Path(qzoo.__file__).parent / "data/text"
SMALL = ("--set", "calibration.samples=8", "--set", "calibration.length=128", "--eval-tokens", "1024")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def call(*argv: object) -> Any:
        capfd.readouterr()
        code = main([str(a) for a in argv])
        said = capfd.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One run of the main job, which several tests look at."""
    out = tmp_path_factory.mktemp("main") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["quantize", "zoo:tiny-llama", "--recipe", "w4a16-gptq", "-o", str(out), *SMALL]) == 0
    yield out
    torch.set_num_threads(threads)


def test_the_main_job_writes_a_small_faithful_proven_checkpoint(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    scores = report["quality"]["scores"]
    assert report["size"]["effective_bits"] == pytest.approx(4.25, abs=0.01)  # 4 bits and a 16-bit scale for 64 weights
    assert report["size"]["after_bytes"] < report["size"]["before_bytes"] / 3
    assert 0 < scores["kl"] < 0.02 and scores["top1"] > 0.9
    assert scores["perplexity"] == pytest.approx(scores["perplexity_reference"], rel=0.05)
    assert report["proof"]["level"] in ("identical", "close") and report["proof"]["loader"].startswith("transformers.")
    assert report["data"]["note"] == "calibrated on calib.txt, evaluated on eval.txt"
    assert len(report["sites"]) == 28 and all(row["of"] == "output" and row["kernel"] != "–" for row in report["sites"])


def test_the_checkpoint_is_explained_measured_and_compared(made: Path, run) -> None:
    explained = run("explain", made, "*.down_proj", "--json")
    rows = json.loads(explained.out)
    assert explained.code == 0 and len(rows) == 4 and all(r["weight"].startswith("int4 per group 64") and r["kernel"] for r in rows)
    compared = json.loads(run("compare", "zoo:tiny-llama", made, "--json", "--eval-tokens", "512").out)
    assert compared[0]["scores"]["kl"] == 0 < compared[1]["scores"]["kl"] and compared[1]["effective_bits"] < 4.3
    alone = run("eval", made, "--eval", TEXT / "eval_docs.txt", "--eval-tokens", "512", "--json")
    assert alone.code == 0 and json.loads(alone.out)["scores"]["perplexity"] > 1


def test_the_same_command_gives_the_same_bytes(made: Path, tmp_path: Path, run) -> None:
    assert run("quantize", "zoo:tiny-llama", "--recipe", "w4a16-gptq", "-o", tmp_path / "again", *SMALL).code == 0
    for name in ("model.safetensors", "qcore.json", "config.json"):
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_transformers_folder_with_a_text_of_ones_own(tmp_path: Path, run) -> None:
    done = run("quantize", TINY, "--recipe", "w4a16-rtn", "--calib", TEXT / "calib.txt", "-o", tmp_path / "out", "--eval-tokens", "512")
    assert done.code == 0 and "no calibration data was needed, evaluated on the last 20 % of calib.txt" in done.out


# broken input -----------------------------------------------------------------------------------------------------------------------------


def copy_of_tiny(folder: Path) -> Path:
    shutil.copytree(TINY, folder)
    return folder


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{garble}" + b"x" * 100)


def nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


BROKEN = {
    "cut off": (cut, ["model.safetensors", "truncated or corrupt", "fetch"]),
    "garbled": (garble, ["model.safetensors", "corrupt", "fetch"]),
    "without weights": (remove, ["no *.safetensors file"]),
    "with a tensor missing": (drop, ["up_proj.weight"]),
    "with a NaN": (nan, ["NaN or infinite", "mend the source", "model.layers.1.mlp.up_proj"]),
}


@pytest.mark.parametrize(("breaks", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_is_named_and_nothing_is_written(tmp_path: Path, run, breaks: Callable[[Path], None], words: list[str]) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    breaks(folder)
    done = run("quantize", folder, "--recipe", "w4a16-rtn", "-o", tmp_path / "out")
    assert done.code == 2 and "Traceback" not in done.err, done.err
    for word in words:
        assert word in done.err, done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_nan_is_named_before_the_float_model_is_measured(tmp_path: Path, run) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    nan(folder)
    done = run("quantize", folder, "--recipe", "w4a16-rtn", "--eval", TEXT / "eval.txt", "-o", tmp_path / "out")
    assert done.code == 2 and "model.layers.1.mlp.up_proj.weight: 1 of 196608 values are NaN or infinite (first at (3, 5)); mend" in done.err


def test_a_cut_checkpoint_and_one_of_a_newer_qcore_are_named(made: Path, tmp_path: Path, run) -> None:
    shutil.copytree(made, tmp_path / "cut")
    cut(tmp_path / "cut")
    shorter = run("explain", tmp_path / "cut")
    assert shorter.code == 2 and "model.safetensors" in shorter.err and "truncated" in shorter.err
    shutil.copytree(made, tmp_path / "newer")
    manifest = json.loads((tmp_path / "newer/qcore.json").read_text())
    (tmp_path / "newer/qcore.json").write_text(json.dumps(manifest | {"manifest": 99}))
    newer = run("explain", tmp_path / "newer")
    assert newer.code == 2 and "99" in newer.err and "upgrade qcore" in newer.err


def test_a_quantized_checkpoint_is_not_quantized_again(made: Path, tmp_path: Path, run) -> None:
    done = run("quantize", made, "--recipe", "w4a16-rtn", "-o", tmp_path / "out")
    assert done.code == 2 and "quantized already" in done.err
