"""A model that brings data and a task of its own goes through plan, quantize, eval, compare and verify; a checkpoint finds them again."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from qcore.calibration.text import TextFile
from qcore.cli import main
from qcore.cli._options import open_model
from qcore.evaluation import Agreement, LabelledFile, LabelledTexts
from qcore.model import LoadedModel, ModelSource, parameters_on_meta
from qcore.model.reader import DictReader
from qcore.plugins.registry import Registry
from qcore.testing.models import TinyConfig, TinyDecoder, TinyDecoderAdapter, tiny_decoder

RECIPE = """
[solver]
name = "gptq"

[[rules]]
sites = "*:weight"
format = { name = "int", bits = 4 }
granularity = { name = "channel" }
"""
SMALL = ("--set", "calibration.samples=4", "--set", "calibration.length=16")


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) % 64 for c in text]


class Adapter(TinyDecoderAdapter):
    def outputs(self, model: Any, batch: Any) -> Any:
        return model(batch["input_ids"])[:, -1]


def judge(ids: list[torch.Tensor], labels: torch.Tensor, train: int) -> Agreement:
    """The last token's logits, against the label."""
    return Agreement([{"input_ids": i.unsqueeze(0)} for i in ids[train:]], [label.view(1) for label in labels[train:]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where `tiny:labelled` was quantized into out/; `tiny:bare` brings no labelled texts."""
    folder = tmp_path_factory.mktemp("own-data")
    (folder / "gptq.toml").write_text(RECIPE)
    (folder / "calib.txt").write_text("the quick brown fox jumps over the lazy dog, again and again. " * 40)
    (folder / "labels.tsv").write_text("".join(f"{'ab'[i % 2]}\tpack {i} boxes\n" for i in range(40)))
    (folder / "mine.tsv").write_text("".join(f"{'xyz'[i % 3]}\tsend {i} jugs\n" for i in range(30)))

    class Tiny(ModelSource):
        name: ClassVar[str] = "tiny"
        help: ClassVar[str] = "tiny:labelled, tiny:bare"

        def matches(self, uri: str) -> bool:
            return uri.startswith("tiny:")

        def load(self, uri: str) -> LoadedModel:
            reader = DictReader(tiny_decoder(seed=0).state_dict())
            evaluation = None if uri == "tiny:bare" else LabelledFile(folder / "labels.tsv")
            data = LabelledTexts(Letters(), Letters().encode, judge, TextFile(folder / "calib.txt"), evaluation, missing="write labels.tsv")
            return LoadedModel(self.skeleton(folder), reader, uri, torch.float32, None, "tiny", data=data)

        def skeleton(self, folder: Path) -> Any:
            with parameters_on_meta():
                return TinyDecoder(TinyConfig()).eval()

    registry = Registry("")
    registry.sources.add("tiny", Tiny, "here")
    registry.adapters.add("tiny-decoder", Adapter, "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcore.plugins.load_registry", lambda: registry)
        patch.chdir(folder)
        assert main(["quantize", "tiny:labelled", "-r", "gptq.toml", "-o", "out", *SMALL]) == 0
        yield folder


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(argv))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_the_report_says_what_it_was_calibrated_and_judged_on(folder: Path) -> None:
    report = json.loads((folder / "out/report.json").read_text())
    assert report["data"]["note"] == "calibrated on calib.txt, judged by the labels of labels.tsv"
    assert report["data"]["calibration"]["tokens"] == 64 and report["data"]["evaluation"]["labels"] == 2
    assert report["quality"]["task"] == "agreement" and report["quality"]["scores"]["kl"] > 0


def test_a_checkpoint_is_evaluated_on_what_its_model_brings(folder: Path, run) -> None:
    report = json.loads((folder / "out/report.json").read_text())["quality"]["scores"]
    for argv in (("eval", "out"), ("eval", "out", "--reference", "tiny:labelled")):
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        assert json.loads(out)["scores"]["accuracy"] == report["accuracy"]
    assert json.loads(out)["scores"]["kl"] == pytest.approx(report["kl"], rel=1e-6)


def test_the_users_own_labelled_file_goes_first(run) -> None:
    brought = json.loads(run("compare", "tiny:labelled", "out", "--json")[1])
    code, out, _ = run("compare", "tiny:labelled", "out", "--eval", "mine.tsv", "--json")
    mine = json.loads(out)
    assert code == 0 and mine[1]["scores"]["rows"] != brought[1]["scores"]["rows"]
    assert json.loads(run("eval", "out", "--eval", "mine.tsv", "--json")[1])["scores"]["rows"] == mine[1]["scores"]["rows"]


def test_it_is_planned_and_made_again_to_the_same_bytes(folder: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("qcore.cli.verify.open_model", lambda *args: asked.append(args) or open_model(*args))
    assert run("plan", "tiny:labelled", "-r", "gptq.toml")[0] == 0
    code, out, err = run("verify", "out", "--reproduce", "--json")
    assert code == 0, err
    assert json.loads(out)["files_reproduced"] > 1
    # with the adapter that the checkpoint names: another that understands the model too might link other axes
    assert [args[2] for args in asked] == [json.loads((folder / "out/qcore.json").read_text())["adapter"]] != [""]


def test_without_labelled_texts_a_run_says_what_to_do(folder: Path, run) -> None:
    code, out, _ = run("quantize", "tiny:bare", "-r", "gptq.toml", "-o", "unjudged", *SMALL)
    assert code == 0 and "not evaluated: there are no labelled texts; write labels.tsv" in " ".join(out.split())
    code, _, err = run("eval", "unjudged")
    assert code == 2 and "brings no evaluation data; write labels.tsv" in err
