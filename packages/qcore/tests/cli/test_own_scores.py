"""A task that measures neither KL divergence nor agreement goes through quantize, eval, compare and the report, as docs/add/task.md has it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.calibration.text import data_hash
from qcore.cli import main
from qcore.evaluation.report import own_scores
from qcore.evaluation.store import write_reference
from qcore.model import LoadedModel, ModelSource, parameters_on_meta
from qcore.model.reader import DictReader
from qcore.plugins.registry import Registry
from qcore.testing.models import tiny_mlp

RECIPE = """
solver = "rtn"

[[rules]]
sites = "*:weight"
format = { name = "int", bits = 4 }
granularity = "channel"
"""


@dataclass(frozen=True)
class Regression:
    """Mean squared distance of two models' numbers."""

    name: ClassVar[str] = "regression"
    better: ClassVar[dict[str, bool]] = {"relative_mse": False}
    rows: torch.Tensor

    def data(self):
        return data_hash(self.rows)

    def sample(self):
        return self.rows[:1]

    def reference(self, forward, folder, progress=None):
        return write_reference(folder, [forward(self.rows).detach()], len(self.rows), self.data())

    def evaluate(self, forward, reference, progress=None):
        kept = reference.read(0, reference.rows)
        return {"relative_mse": float((forward(self.rows).detach() - kept).square().mean() / kept.var()), "spread_reference": 2.5, "spread": 1.5}


@dataclass(frozen=True)
class Rows:
    calibration: Any = None
    evaluation: Any = "rows"

    def chosen(self, calibration, evaluation):
        return self

    def batches(self, settings):
        return []

    def task(self):
        return Regression(torch.linspace(-1, 1, 320).reshape(20, 16))

    def note(self, *, calibrated=True, source=""):
        return "judged by 20 rows"

    def record(self, batches, task):
        return {"calibration": None, "evaluation": None}


class Numbers(ModelSource):
    name: ClassVar[str] = "numbers"
    help: ClassVar[str] = "numbers:"

    def matches(self, uri: str) -> bool:
        return uri == "numbers:"

    def load(self, uri: str) -> LoadedModel:
        return LoadedModel(self.skeleton(Path()), DictReader(tiny_mlp().state_dict()), uri, source="numbers", data=Rows())

    def skeleton(self, folder: Path) -> Any:
        with parameters_on_meta():
            return tiny_mlp()

    def data(self, folder: Path) -> Any:
        return Rows()


def test_a_task_with_scores_of_its_own(tmp_path, monkeypatch, capsys):
    registry = Registry("")
    registry.sources.add("numbers", Numbers, "here")
    monkeypatch.setattr("qcore.plugins.load_registry", lambda: registry)
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(RECIPE)

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main(list(argv)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    out = run("quantize", "numbers:", "-r", "mine.toml", "-o", "out")
    scores = json.loads(Path("out/report.json").read_text())["quality"]["scores"]
    assert scores["relative_mse"] > 0
    assert "│ relative mse " in out and f"{scores['relative_mse']:.6g}" in out
    assert "KL divergence" not in out and "top-1" not in out
    assert [cell.strip() for cell in next(line for line in out.splitlines() if "spread" in line).split("│")[1:4]] == ["spread", "2.5", "1.5"]
    page = Path("out/report.html").read_text()
    assert f"<b>{scores['relative_mse']:.6g}</b><span>relative mse</span>" in page and "<span>spread, was 2.5</span>" in page
    assert f"{scores['relative_mse']:.6g}" in run("eval", "out", "--reference", "numbers:")
    assert "relative_mse" in run("compare", "numbers:", "out")
    for wish in (("--plot", "x.svg"), ("--attribute",)):
        capsys.readouterr()
        assert main(["compare", "numbers:", "out", *wish]) == 2
        assert f"{wish[0]} goes by KL divergence, and the task 'regression'" in capsys.readouterr().err


def test_scores_of_other_tasks_are_left_to_the_words_they_have():
    assert own_scores({"kl": 0.1, "kl_standard_error": 0.01, "accuracy": 0.5, "accuracy_reference": 0.6, "tokens": 12}) == {}
    assert own_scores({"drift": 0.25, "drift_reference": 0.5, "rows": 3}) == {"drift": ("0.5", "0.25")}
