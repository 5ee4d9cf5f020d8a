"""`qcore quantize` that is interrupted, killed, and gone on with; streamed and in memory.  A real pipeline on a tiny model."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from qcore.cli._run_folder import check_target
from qcore.errors import SpecError

SCRIPT = """
import os, sys
from dataclasses import replace
from pathlib import Path
import torch, typer
from qcore.cli import boundary
from qcore.cli._job import Job, run_quantize
from qcore.cli._run_folder import check_target
from qcore.evaluation import choose_text
from qcore.model import LoadedModel, ModelSource, parameters_on_meta
from qcore.model.reader import DictReader
from qcore.numbers import int_weight
from qcore.plugins.registry import Registry
from qcore.recipe import CalibrationSettings, Recipe, Rule
from qcore.solvers import GPTQ
from qcore.solvers.mixed import Candidate, Mixed
from qcore.testing.models import TinyConfig, TinyDecoder, TinyDecoderAdapter, tiny_decoder

class Letters:
    def encode(self, text):
        return [ord(c) % 64 for c in text]

class Tiny(ModelSource):
    name, help = "tiny", "tiny:"
    def matches(self, uri):
        return uri == "tiny:"
    def skeleton(self, folder):
        with parameters_on_meta():
            return TinyDecoder(TinyConfig(layers=4)).eval()

class Adapter(TinyDecoderAdapter):
    def outputs(self, model, batch):
        return model(batch["input_ids"])

torch.set_num_threads(1)
out, mode, kill_at = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
registry = Registry("")
registry.sources.add("tiny", Tiny, "here")
registry.adapters.add("tiny-decoder", Adapter, "here")
weights = tiny_decoder(layers=4).state_dict()
loaded = LoadedModel(Tiny().skeleton(None), DictReader(weights), "tiny:", torch.float32, Letters(), "tiny")
recipe = Recipe(name="r", rules=(Rule("*:weight", int_weight(4, 16)),), solver=GPTQ(), calibration=CalibrationSettings(samples=8, length=16))
if "mixed" in mode:
    widths = tuple(Candidate(spec=int_weight(b, 16)) for b in (2, 4, 6))
    recipe = replace(recipe, allocator=Mixed(bits=5.2, metric="mse", candidates=widths))
text = choose_text(Path(sys.argv[4]), Path(sys.argv[5]), None, None)
def progress(phase, done, total):
    if kill_at == f"{phase}:{done}":
        os.kill(os.getpid(), 9)

def cut_save(*args, **options):
    from qcore.checkpoint import save
    from qcore.modules import serve_in
    serve_in(args[0], options["dtype"])
    if kill_at == "save":
        module = sys.modules["qcore.checkpoint.save"]
        def cut(path, *a, **b):
            path.write_bytes(b"half of it")
            os.kill(os.getpid(), 9)
        module.write_safetensors = cut
    save(*args, **options)

from qcore.cli._job import Steps
real = Steps.real()
real.save = cut_save
job = Job(loaded, recipe, Adapter(), registry, text, eval_tokens=256, window=64, steps=real, stream="stream" in mode, resume="resume" in mode)
try:
    with boundary():
        if not check_target(out, force=False, resume=job.resume):
            run_quantize(job, out, progress)
except typer.Exit as e:
    sys.exit(e.exit_code)
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, word in (("calib", "the cat sat on mat number"), ("eval", "a dog ran to tree number")):
        (folder / f"{name}.txt").write_text("".join(f"{word} {i}\n" for i in range(200)))
    return folder / "calib.txt", folder / "eval.txt"


@pytest.fixture
def run(tmp_path: Path, texts):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def call(out: str, *mode: str, kill: str = "-") -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(script), str(tmp_path / out), ",".join(mode), kill, *map(str, texts)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ | {"QCORE_PLUGINS": ""})

    return call


def bytes_of(folder: Path) -> dict[str, str]:
    """All files but those that hold times: what must not depend on how a run came to its end."""
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.name not in ("report.json", "report.html", "proof.json")
    }


@pytest.mark.parametrize(
    ("kill", "first", "then"),
    [
        ("save", (), ("stream",)),
        pytest.param("block:1", (), (), marks=pytest.mark.slow),
        pytest.param("block:3", ("stream",), (), marks=pytest.mark.slow),
        pytest.param("block:1", ("mixed",), ("mixed", "stream"), marks=pytest.mark.slow),
        pytest.param("float model:2", (), (), marks=pytest.mark.slow),
        pytest.param("evaluate:2", ("stream",), ("stream",), marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_the_bytes_are_the_same(run, tmp_path: Path, kill: str, first, then) -> None:
    assert run("whole", *(mode for mode in first if mode != "stream")).returncode == 0
    whole = bytes_of(tmp_path / "whole")
    assert sorted(whole) == ["README.md", "model.qcore.safetensors", "qcore.json"]
    assert run("out", *first, kill=kill).returncode == -9
    assert not (tmp_path / "out").exists()
    done = run("out", "resume", *then)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "script.py", "whole"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["quality"]["scores"]["tokens"] > 0


def test_an_unfinished_run_is_neither_deleted_nor_passed_over(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "block-00000.json").write_text("{}")
    with pytest.raises(SpecError, match=r"out.run/ beside out holds an unfinished run with 1 finished blocks; go on with --resume"):
        check_target(tmp_path / "out", force=False)
    assert check_target(tmp_path / "out", force=True) is check_target(tmp_path / "out", force=False, resume=True) is False


def test_killed_between_the_last_rename_and_the_end_there_is_nothing_left_to_do(tmp_path: Path) -> None:
    for name in ("out/report.json", "out.run/run.json", "out.run/block-00000.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert check_target(tmp_path / "out", force=False, resume=True) is True
    (tmp_path / "out.run" / "checkpoint").mkdir()
    with pytest.raises(SpecError, match="not empty"):
        check_target(tmp_path / "out", force=False, resume=True)


def test_two_runs_into_one_folder_the_second_is_refused(tmp_path: Path, texts) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    from qcore.checkpoint.journal import Journal

    held = Journal(tmp_path / "out.run", {})
    argv = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out"), "", "-", *map(str, texts)]
    second = subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ | {"QCORE_PLUGINS": ""})
    held.close()
    assert second.returncode == 2 and "another process is writing into" in second.stderr
    assert (tmp_path / "out.run" / "run.json").is_file()  # nothing of the first run was touched
