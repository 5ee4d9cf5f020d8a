"""timm's models as a source, the whole path of a tiny RepVGG, and what is refused on the way."""

import json
from pathlib import Path

import pytest
import torch
from qcore.checkpoint import load, prove
from qcore.cli import main
from qcore.errors import CheckpointError, NotFound, SpecError
from qcore.evaluation.data import ImagePair
from qcore.model import adapter_for, load_source
from qcore.pipeline import load_in_memory
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe, parse_recipe
from qcore.testing import check_adapter
from qcore.testing.models import randomize
from qplug_reparam.adapter import Reparam
from qplug_reparam.fuse import fuse
from qplug_reparam.report import EXACT, lines, picture, report_model
from qplug_reparam.timm_source import TimmSource, parse
from safetensors.torch import load_file, save_file
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.repvit import RepVit
from torch import nn

BLOCKS = [{"type": "rep", "d": 1, "c": 8, "s": 1, "gs": 0}, {"type": "rep", "d": 2, "c": 16, "s": 2, "gs": 4}]
AMOUNT = ("--set", "calibration.samples=32")
CFG = {"blocks": BLOCKS, "stem_type": "rep", "stem_chs": 8}


def build_tiny() -> nn.Module:
    blocks = tuple(ByoBlockCfg(**b) for b in BLOCKS)
    torch.manual_seed(0)
    model = ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=3, in_chans=1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.05, 1)
            m.weight.data.uniform_(0.5, 1.5)
    return model.eval()


def write_folder(folder: Path, tensors: dict, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = {"pad": 0, "mean": [0.5], "std": [0.5]}
    config = {"architecture": "timm.models.byobnet.ByobNet", "cfg": CFG, "num_classes": 3, "in_chans": 1, "input_size": [1, 12, 12]}
    (folder / "config.json").write_text(json.dumps({**config, "preprocessing": preprocessing, **more}))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return build_tiny()


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny) -> Path:
    """A folder of the model, and image files beside it."""
    root = tmp_path_factory.mktemp("tiny")
    write_folder(root / "model", tiny.state_dict())
    g = torch.Generator().manual_seed(0)
    for name in ("calib", "eval"):
        pixels = torch.randint(0, 256, (64, 12, 12), dtype=torch.uint8, generator=g)
        x = (pixels.float().unsqueeze(1) / 255 - 0.5) / 0.5
        with torch.no_grad():
            labels = tiny(x).argmax(1)
        save_file({"images": pixels, "labels": labels}, root / f"{name}.safetensors")
    return root


def test_the_loaded_model_is_the_one_with_branches(files, tiny, registry):
    loaded = load_source(str(files / "model"), registry.sources)
    assert loaded.source == "timm"
    assert "4 blocks of branches" in loaded.notes[0]
    fused = fuse(tiny).state_dict()
    assert set(loaded.reader.names()) == set(fused)
    assert all(torch.equal(loaded.reader[name], t) for name, t in fused.items())
    assert all(p.is_meta for p in loaded.model.parameters())


def test_links_of_a_fused_repvgg_are_true(tiny):
    torch.manual_seed(0)
    check_adapter(Reparam(), fuse(tiny), torch.randn(2, 1, 12, 12))


def mobileone() -> nn.Module:
    blocks = (
        ByoBlockCfg(type="one", d=2, c=8, s=1, gs=0, block_kwargs={"num_conv_branches": 2}),
        ByoBlockCfg(type="one", d=1, c=16, s=2, gs=1),
    )
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="one", stem_chs=8), num_classes=3)


@pytest.mark.parametrize(
    "family", [mobileone, lambda: RepVit(embed_dim=(8, 16), depth=(1, 1), num_classes=3, distillation=False)], ids=["mobileone", "repvit"]
)
def test_other_families_are_fused_whole_and_their_links_are_true(family):
    torch.manual_seed(0)
    model = randomize(family()).double().eval()
    fused = fuse(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(images), model(images), rtol=1e-10, atol=1e-12)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    check_adapter(Reparam(), fused, images)


def test_a_deployed_state_dict_is_taken_as_it_is(tmp_path, tiny, registry):
    folder = write_folder(tmp_path / "deployed", fuse(tiny).state_dict(), deployed=True)
    loaded = load_source(str(folder), registry.sources)
    assert loaded.notes == ()
    assert torch.equal(loaded.reader["stem.reparam_conv.weight"], fuse(tiny).state_dict()["stem.reparam_conv.weight"])


def test_branches_in_a_folder_that_is_called_deployed_are_refused(tmp_path, tiny, registry):
    folder = write_folder(tmp_path / "said", tiny.state_dict(), deployed=True)
    with pytest.raises(CheckpointError, match=r"is called deployed, yet the weights of stem \(4 of 4 blocks\) are those of separate branches"):
        load_source(str(folder), registry.sources)


def test_a_half_fused_state_dict_is_refused(tmp_path, tiny, registry):
    fused, branched = fuse(tiny).state_dict(), tiny.state_dict()
    half = {n: t for n, t in fused.items() if n.startswith("stem")} | {n: t for n, t in branched.items() if not n.startswith("stem")}
    folder = write_folder(tmp_path / "half", half)
    with pytest.raises(CheckpointError, match=r"has stem\.reparam_conv, yet the weights of stages\.0\.0 \(3 of 4 blocks\)"):
        load_source(str(folder), registry.sources)


def test_weights_that_lack_a_tensor_are_refused(tmp_path, tiny, registry):
    tensors = {n: t for n, t in tiny.state_dict().items() if n != "stem.conv_1x1.bn.running_var"}
    with pytest.raises(CheckpointError, match=r"lack 1 tensors of the model, stem\.conv_1x1\.bn\.running_var first"):
        load_source(str(write_folder(tmp_path / "lack", tensors)), registry.sources)


def test_norms_without_variance_are_noted_when_a_model_is_loaded(tmp_path, tiny, registry):
    tensors = {n: t.clone() for n, t in tiny.state_dict().items()}
    tensors["stages.0.0.identity.running_var"][[1, 4]] = 0
    loaded = load_source(str(write_folder(tmp_path / "silent", tensors)), registry.sources)
    assert loaded.notes[1].startswith("2 channels of 1 batch norms have a running variance of 0, stages.0.0.identity first")


@pytest.mark.parametrize(
    ("uri", "error", "says"),
    [
        ("timm:repvgg_a0", SpecError, "does not say where the weights are, and qcore downloads none"),
        ("timm:repvgg_a0@random?pretrained=true", SpecError, "would be downloaded"),
        ("timm:repvgg_a0@nowhere.safetensors", NotFound, "nowhere.safetensors does not exist"),
        ("timm:repvgg_zero@random", NotFound, "has no model 'repvgg_zero'; it has: repvgg_"),
        ("timm:repvgg_a0@random:x", SpecError, "a whole number"),
        ("timm:repvgg_a0@random?num_classes", SpecError, "not of the form name=value"),
    ],
)
def test_addresses_that_cannot_be_loaded_say_why(uri, error, says):
    with pytest.raises(error, match=says):
        TimmSource().load(uri)


def test_options_of_an_address_are_toml():
    assert parse("timm:repvgg_a0@random:3?num_classes=7&act_layer=silu") == ("repvgg_a0", "random:3", {"num_classes": 7, "act_layer": "silu"})


def test_random_weights_by_seed_and_timms_own_preprocessing(registry):
    one, again = (load_source("timm:mobileone_s0@random:1?num_classes=4", registry.sources) for _ in range(2))
    name = "stem.reparam_conv.weight"
    assert torch.equal(one.reader[name], again.reader[name])
    assert one.data.preprocessing.size == (3, 224, 224)
    assert "random" in one.notes[0]
    assert adapter_for(one.model, registry.adapters).name == "reparam"


def test_branches_of_a_model_in_memory_are_refused_before_any_work(tiny, registry):
    loaded = load_in_memory(build_tiny())
    recipe = load_recipe("cfws-w8a8", registry)
    adapter = adapter_for(loaded.model, registry.adapters)
    with pytest.raises(SpecError, match=r"4 blocks have branches that are not fused, stem first"):
        make_plan(loaded, recipe, adapter, registry)


def test_zoo_model_brings_its_images(registry):
    loaded = load_source("zoo:tiny-repvgg", registry.sources)
    assert isinstance(loaded.data, ImagePair)
    task = loaded.data.task()
    assert task.pixels.shape == (1000, 1, 28, 28)
    assert task.sample().shape == (8, 1, 32, 32)


@pytest.mark.parametrize(("part", "problems"), [("fine", 0), ("fin", 1)])
def test_rules_may_name_the_parts_of_a_split_before_they_are_there(files, registry, part, problems):
    rule = f'[[rules]]\nsites = "*.{part}:weight"\nformat = {{ name = "int", bits = 6 }}\ngranularity = "channel"\n'
    recipe = parse_recipe(f'extends = "cfws-w8a8"\n{rule}', registry)
    loaded = load_source(str(files / "model"), registry.sources)
    assert len(make_plan(loaded, recipe, Reparam(), registry).problems) == problems


# the whole path


@pytest.fixture(scope="module")
def written(files) -> Path:
    out = files / "out"
    options = ["--calib", str(files / "calib.safetensors"), "--eval", str(files / "eval.safetensors"), *AMOUNT]
    assert main(["quantize", str(files / "model"), "--recipe", "cfws-w8a8", "-o", str(out), *options]) == 0
    return out


def test_quantize_writes_a_checkpoint_with_proof_and_accuracy(written):
    report = json.loads((written / "report.json").read_text())
    scores = report["quality"]["scores"]
    assert report["quality"]["task"] == "image-classification"
    assert scores["accuracy_reference"] == 1.0  # the labels are the float model's own answers
    assert scores["accuracy"] > 0.9
    assert report["proof"]["level"] == "identical"
    assert report["data"]["calibration"]["images"] == 32
    sites = [row["site"] for row in report["sites"]]
    assert "stem.reparam_conv.coarse:weight" in sites
    assert "stem.reparam_conv.fine:weight" in sites
    assert scores["sqnr_db"] > 30
    (file,) = written.glob("*.safetensors")
    shapes = {name: tuple(t.shape) for name, t in load_file(file).items()}
    assert any(name.startswith("stem.reparam_conv.coarse") and shape == (8, 1) for name, shape in shapes.items())  # one tap, one input channel


def test_the_checkpoint_opens_in_a_fresh_process(written):
    model = load(written)
    images = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    assert prove(written, model, [images], fresh=True).level == "identical"


def test_a_batch_of_another_size_gives_the_same_answers(written):
    model = load(written)
    images = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    whole = model(images)
    torch.testing.assert_close(torch.cat([model(images[:1]), model(images[1:])]), whole, rtol=1e-5, atol=1e-6)


def test_images_of_another_size_end_before_the_computation(files, tmp_path, capsys):
    small = tmp_path / "small.safetensors"
    save_file({"images": torch.zeros(64, 9, 9, dtype=torch.uint8)}, small)
    assert main(["quantize", str(files / "model"), "--recipe", "cfws-w8a8", "-o", str(tmp_path / "out"), "--calib", str(small), *AMOUNT]) == 2
    assert "1×9×9 are no input of this model, which reads 1×12×12" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_channel_of_zeros_survives_the_whole_path(files, tmp_path, tiny):
    model = fuse(tiny)
    model.get_submodule("stages.0.0.reparam_conv").weight.data[2] = 0
    folder = write_folder(tmp_path / "zeros", model.state_dict())
    options = ["--calib", str(files / "calib.safetensors"), "--eval", str(files / "eval.safetensors"), *AMOUNT]
    assert main(["quantize", str(folder), "--recipe", "cfws-w8a8", "-o", str(tmp_path / "out"), *options]) == 0
    scores = json.loads((tmp_path / "out" / "report.json").read_text())["quality"]["scores"]
    assert scores["sqnr_db"] > 20


# the report


def test_the_report_names_the_branch_that_blew_up_the_range(tiny):
    model = build_tiny().eval()
    model.stages[1][1].identity.running_var.fill_(1e-4)  # a gain of about 100
    reports = report_model(model, torch.randn(2, 1, 12, 12))
    worst = max(reports, key=lambda r: r.blow_up)
    assert (worst.module, worst.culprit) == ("stages.1.1", "identity")
    assert worst.blow_up > 20
    assert all(r.difference is not None and r.difference < EXACT for r in reports)
    text = "\n".join(lines(reports))
    assert f"largest blow-up: stages.1.1, {worst.blow_up:.1f} times its ring, by identity" in text
    svg = picture(reports, "a < b")
    assert svg.count("<circle") >= sum(len(r.largest) for r in reports)
    assert "a &lt; b" in svg


def test_a_norm_without_variance_is_in_the_report(tiny):
    model = build_tiny().eval()
    model.stem.conv_1x1.bn.running_var[3] = 0
    assert any("stem.conv_1x1.bn: 1 channels have a running variance of 0 (channel 3 first)" in line for line in lines(report_model(model)))


def test_the_command_prints_and_draws(files, tmp_path, capsys):
    assert main(["reparam", str(files / "model"), "-o", str(tmp_path / "x.svg"), "--images", "2"]) == 0
    out = capsys.readouterr().out
    assert "largest blow-up" in out
    assert (tmp_path / "x.svg").read_text().startswith("<svg")
