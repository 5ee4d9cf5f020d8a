"""`qcore export` on a small convolutional network."""

import json
from typing import ClassVar

import pytest
import torch
from qcore.checkpoint import save
from qcore.cli import export, main
from qcore.model import ModelSource
from qcore.model.plain import PlainCNN
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe_file import load_recipe
from qcore.testing.models import tiny_cnn

pytest.importorskip("onnx")


class TinySource(ModelSource):
    name: ClassVar[str] = "tiny-cnn"
    help: ClassVar[str] = "tiny:"

    def matches(self, uri):
        return uri == "tiny:"

    def skeleton(self, folder):
        return tiny_cnn()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    own = Registry("")
    own.sources.add(TinySource.name, TinySource, "test")
    batches = [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    q = quantize_model(load_in_memory(tiny_cnn()), load_recipe("cnn-w8a8", own), batches, registry=own, adapter=PlainCNN())
    folder = tmp_path_factory.mktemp("export") / "out"
    save(q.model, folder, source=TinySource.name, adapter="plain-cnn", registry=own)
    return folder, own


def run(checkpoint, monkeypatch, capsys, *more):
    folder, own = checkpoint
    monkeypatch.setattr(export, "registry", lambda: own)
    code = main(["export", str(folder), "--shape", "2,3,12,12", *more])
    return code, capsys.readouterr()


def test_a_checkpoint_becomes_a_file_that_onnx_runtime_agrees_on(checkpoint, monkeypatch, capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    code, told = run(checkpoint, monkeypatch, capsys, "--to", "onnx", "-o", str(tmp_path / "a.onnx"), "--json")
    found = json.loads(told.out)
    assert code == 0 and (tmp_path / "a.onnx").stat().st_size == found["bytes"]
    assert found["largest_difference"] < 0.03 and "uint8 with the zero point 128" in found["notes"][0]
    code, told = run(checkpoint, monkeypatch, capsys, "-o", str(tmp_path / "b.onnx"), "--set", "weights=int8", "--json")
    assert code == 0 and json.loads(told.out)["notes"] == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--to", "onyx"], "onnx"),
        (["--shape", "3,x"], "positive sizes"),
        (["--set", "weight=int8"], "with the keys: weights"),
        (["--set", "weights=int4"], "auto, int8 or uint8"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(checkpoint, monkeypatch, capsys, tmp_path, more, words):
    code, told = run(checkpoint, monkeypatch, capsys, "-o", str(tmp_path / "a.onnx"), *more)
    assert code == 2 and words in told.err and not list(tmp_path.iterdir())
