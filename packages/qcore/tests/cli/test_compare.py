"""`qcore compare` on real checkpoints of a tiny model: attribution, the front, the plot; `qcore report`."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from qcore.cli import main
from qcore.errors import NotFound
from qcore.model import LoadedModel, ModelSource, parameters_on_meta
from qcore.model.reader import DictReader
from qcore.plugins.registry import Registry
from qcore.testing.models import TinyConfig, TinyDecoder, TinyDecoderAdapter, tiny_decoder

RECIPE = """
[solver]
name = "rtn"

[[transforms]]
name = "smoothquant"

[[rules]]
sites = "*:weight"
format = {{ name = "int", bits = {bits} }}
granularity = {{ name = "channel" }}

[[rules]]
sites = "*.layers.1.mlp.down_proj:weight"
format = {{ name = "int", bits = 2 }}
granularity = {{ name = "channel" }}
"""
SMALL = (
    "--eval-tokens",
    "128",
    "--window",
    "16",
    "--set",
    "calibration.samples=4",
    "--set",
    "calibration.length=16",
    "--set",
    "calibration.starts=0",
)
EVAL = ("--eval-tokens", "96", "--window", "16")


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) % 64 for c in text]


class Adapter(TinyDecoderAdapter):
    def outputs(self, model: Any, batch: Any) -> Any:
        return model(batch["input_ids"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with two checkpoints, 8 and 4 bits, with one layer at 2 bits."""
    import torch

    folder = tmp_path_factory.mktemp("compare")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog, again and again. " * 40)
    (folder / "b.txt").write_text("pack my box with five dozen jugs of that liquor, and go home. " * 40)

    class Tiny(ModelSource):
        name: ClassVar[str] = "tiny"
        help: ClassVar[str] = "tiny:SEED"

        def matches(self, uri: str) -> bool:
            return uri.startswith("tiny:")

        def load(self, uri: str) -> LoadedModel:
            reader = DictReader(tiny_decoder(seed=int(uri.removeprefix("tiny:") or 0)).state_dict())
            texts = {"calibration": folder / "a.txt", "evaluation": folder / "b.txt"}
            return LoadedModel(self.skeleton(folder), reader, uri, torch.float32, Letters(), "tiny", **texts)

        def skeleton(self, folder: Path) -> Any:
            with parameters_on_meta():
                return TinyDecoder(TinyConfig()).eval()

        def tokenizer(self, folder: Path) -> Letters:
            return Letters()

    registry = Registry("")
    registry.sources.add("tiny", Tiny, "here")
    registry.adapters.add("tiny-decoder", Adapter, "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcore.plugins.load_registry", lambda: registry)
        patch.chdir(folder)
        for bits in (8, 4):
            (folder / f"{bits}.toml").write_text(RECIPE.format(bits=bits))
            more = ("--attribute",) if bits == 8 else ()
            assert main(["quantize", "tiny:", "-r", f"{bits}.toml", "-o", f"out{bits}", *SMALL, *more]) == 0
        yield folder


@pytest.fixture
def run(made: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(argv))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_the_rewrite_lies_beside_the_weights_and_the_report_can_be_looked_at(made: Path) -> None:
    assert {"rewrite.qcore", "report.html", "report.json"} <= {p.name for p in (made / "out8").iterdir()}
    report = json.loads((made / "out8/report.json").read_text())
    assert report["attribution"]["modules"][0]["module"] == "model.layers.1.mlp.down_proj"
    assert set(report["histograms"]["mlp.down_proj"]) == {"weight_before", "weight_after", "input_before", "input_after"}
    before, after = (report["histograms"]["mlp.down_proj"][f"weight_{when}"] for when in ("before", "after"))
    assert (
        sum(before["counts"]) + before["zeros"]
        == sum(after["counts"]) + after["zeros"]
        == sum(r["values"] for r in report["sites"] if "down_proj" in r["site"])
    )
    assert "model.layers.1.mlp.down_proj saves" in (made / "out8/report.html").read_text()
    assert {"load", "quantize", "evaluate"} <= {span[0] for span in report["memory"]["spans"]} and len(report["memory"]["timeline"]) > 3


def test_the_page_is_made_again_from_its_report(made: Path, run) -> None:
    before = (made / "out8/report.html").read_bytes()
    assert run("report", "out8", "-o", "again.html")[0] == 0
    assert (made / "again.html").read_bytes() == before


def test_attribution_names_the_worst_and_the_front_is_marked(made: Path, run) -> None:
    code, out, _ = run("compare", "tiny:", "out8", "out4", "--attribute", "--plot", "plot.svg", *EVAL)
    assert code == 0
    assert "out8: what each module costs, the worst 10 of 14" in out and "out4: what each module costs" in out
    assert "with all 14 float again" in out
    plot = (made / "plot.svg").read_text()
    assert plot.startswith("<svg") and "out8: " in plot and "out4: " in plot
    code, out, _ = run("compare", "tiny:", "out8", "out4", "--attribute", "--attribute-tokens", "32", "--json", *EVAL)
    rows = json.loads(out)
    assert [r["best"] for r in rows] == [True, True, True]
    assert "attribution" not in rows[0] and rows[1]["attribution"]["rows"] == 30
    worst = rows[1]["attribution"]["modules"][0]
    assert worst["module"] == "model.layers.1.mlp.down_proj" and worst["saved"] > 0.5 * rows[1]["attribution"]["kl"]
    assert all(r["attribution"]["kl_float"] < 1e-6 for r in rows[1:])


BAD = {
    "other weights": (("tiny:1", "out8", "--attribute"), "its modules can only be float again", "name that model first"),
    "a quantized reference": (("out8", "out4", "--attribute", "--eval", "b.txt"), "out8 is quantized", "name the float model first"),
    "a plot of another kind": (("tiny:", "out8", "--plot", "p.png"), "--plot p.png is not called *.svg", "SVG"),
    "a plot nowhere": (("tiny:", "out8", "--plot", "no/p.svg"), "the folder no does not exist", "make it first"),
}


@pytest.mark.parametrize(("argv", "place", "step"), BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_said(run, argv, place: str, step: str) -> None:
    code, _, err = run("compare", *argv, *EVAL)
    assert code == 2 and place.replace("its modules", "modules") in err and step in err and "Traceback" not in err


@pytest.mark.parametrize("damage", ["missing", "cut", "garbled", "unsaid"])
def test_a_rewrite_that_is_not_whole_is_an_error(made: Path, run, tmp_path: Path, damage: str) -> None:
    import shutil

    folder = tmp_path / "out"
    shutil.copytree(made / "out8", folder)
    path = folder / "rewrite.qcore"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "garbled":
        path.write_bytes(path.read_bytes().replace(b"Scale", b"Scald"))
    else:
        manifest = json.loads((folder / "qcore.json").read_text())
        del manifest["record"]["rewrite"]
        (folder / "qcore.json").write_text(json.dumps(manifest))
    code, _, err = run("compare", "tiny:", str(folder), "--attribute", *EVAL)
    assert code == 2 and "again" in err and str(folder) in err and "Traceback" not in err


def test_without_evaluation_text_or_streamed_attribution_is_refused_before_the_work(run, made: Path) -> None:
    code, _, err = run("quantize", "tiny:", "-r", "4.toml", "-o", "no", "--attribute", "--stream", *SMALL)
    assert code == 2 and "--attribute cannot be done: this run is streamed" in err and not (made / "no").exists()


def test_a_streamed_run_has_the_same_histograms(run, made: Path) -> None:
    code, _, err = run("quantize", "tiny:", "-r", "4.toml", "-o", "streamed", "--stream", *SMALL)
    assert code == 0, err
    streamed, whole = (json.loads((made / out / "report.json").read_text())["histograms"] for out in ("streamed", "out4"))
    assert streamed == whole and set(streamed["self_attn.q_proj"]) == {"weight_before", "weight_after", "input_before", "input_after"}


def test_what_was_made_of_something_else_is_known_before_it_is_made_again(made: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    for more, what in ((("--calib", "b.txt"), "calibration_sha256"), (("--model", "tiny:1"), "weights")):
        code, _, err = run("verify", "out4", "--reproduce", *more)
        assert code == 2 and f"out4 was made of other {what}" in err and "block" not in err
    monkeypatch.setattr("qcore.cli.verify.open_model", gone)
    code, _, err = run("verify", "out4", "--reproduce")
    assert code == 2 and "out4 was made from 'tiny:', as seen from where that run was started; pass --model where it is now" in err


def gone(*args: Any) -> Any:
    raise NotFound("no such file or folder")
