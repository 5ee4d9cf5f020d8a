"""The whole path on a tiny LAVT: the command line, what is stored, loaded and judged; what each option of the allocator leaves out."""

import json

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.cli import main
from qcore.errors import SpecError
from qcore.model import adapter_for, load_source
from qcore.modules.tapped import QuantizedTap
from qcore.numbers import spec_from_dict, spec_to_dict
from qcore.pipeline import float_forward, quantize_model
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qcore.testing import check_source, check_task
from qplug_segmentation.allocator import PTQ4RIS
from qplug_segmentation.formats import DualRegion, GeluRegions, MagnitudeBands, StepGrid
from qplug_segmentation.source import LavtSource
from qplug_segmentation.testing import write_folder

SMALL = ("calibration.samples=4", "calibration.batch=4")
FAST = (
    *SMALL,
    *("allocator.candidates=6", "allocator.rounds=1", "allocator.sample_rows=128", "allocator.sample_windows=16"),
    *("rules.1.solver.steps=6", "rules.2.solver.steps=6"),
)


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("lavt"))


def quantized(folder, registry, recipe: str, *overrides: str):
    loaded = load_source(f"lavt:{folder}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    own = load_recipe(recipe, registry, (*(FAST if "ptq4ris" in recipe else SMALL), *overrides))
    return loaded, adapter, quantize_model(loaded, own, loaded.data.batches(own.calibration), registry=registry, adapter=adapter)


@pytest.fixture(scope="module")
def w4a6(folder, registry):
    return quantized(folder, registry, "ptq4ris-w4a4", "allocator.input_bits=6")


def taps(model) -> dict[str, QuantizedTap]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedTap)}


def inputs(model) -> dict[str, object]:
    found = {name: getattr(m, "activation", None) for name, m in model.named_modules() if hasattr(m, "qtensor")}
    return {name: None if spec is None else spec.format for name, spec in found.items()}


def test_every_part_gets_the_numbers_that_the_paper_gives_it(w4a6):
    model = w4a6[2].model
    read = inputs(model)
    assert isinstance(read["backbone.layers.0.blocks.0.mlp.fc2"], GeluRegions)
    assert isinstance(read["backbone.layers.0.blocks.0.attn.qkv"], StepGrid) and read["backbone.layers.0.blocks.0.attn.qkv"].bits == 6
    assert all(isinstance(f, MagnitudeBands) for n, f in read.items() if n.startswith("text_encoder"))
    assert read["backbone.patch_embed.proj"] is None
    assert not any("res_gate" in n or n == "classifier.conv1_1" for n in read)
    kinds = {name.partition(".taps.")[0] + ":" + name.split(".taps.")[1][0]: tap.spec.format for name, tap in taps(model).items()}
    assert isinstance(kinds["backbone.layers.1.blocks.0.attn:p"], DualRegion) and isinstance(kinds["backbone.layers.1.blocks.0.attn:q"], StepGrid)
    assert {type(f).__name__ for n, f in kinds.items() if "fusion" in n or "text_encoder" in n} == {"Int"}
    assert len(kinds) == 4 * (5 + 4 + 1)


def test_weights_of_queries_keys_and_values_have_a_scale_each(w4a6):
    weight = w4a6[2].model.get_submodule("backbone.layers.1.blocks.0.attn.qkv").qtensor()
    scale = weight.scale().flatten().unflatten(0, (3, -1))
    assert weight.spec.format.bits == 4 and bool((scale == scale[:, :1]).all())
    assert len(w4a6[2].model.get_submodule("backbone.layers.1.blocks.0.mlp.fc1").qtensor().scale().unique()) == 1


def test_what_is_saved_is_what_runs(w4a6, registry, tmp_path):
    loaded, adapter, q = w4a6
    save(q.model, tmp_path / "out", registry=registry, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
    again = load(tmp_path / "out", registry=registry)
    batch = loaded.data.task().sample()
    with torch.no_grad():
        assert torch.equal(adapter.outputs(again, batch), adapter.outputs(q.model, batch))
    spec = next(iter(taps(q.model).values())).spec
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec))), registry.formats) == spec


def test_the_same_seed_finds_the_same_numbers(w4a6, folder, registry):
    again = quantized(folder, registry, "ptq4ris-w4a4", "allocator.input_bits=6")[2].model.state_dict()
    assert all(torch.equal(t, again[n]) for n, t in w4a6[2].model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "gone"),
    [
        ('allocator.softmax="uniform"', DualRegion),
        ("allocator.gelu=[]", GeluRegions),
        ("allocator.text=[]", MagnitudeBands),
    ],
)
def test_an_option_leaves_out_its_part_alone(folder, registry, override, gone):
    model = quantized(folder, registry, "ptq4ris-w4a4", override)[2].model
    formats = {type(f) for f in (*inputs(model).values(), *(t.spec.format for t in taps(model).values()))}
    assert gone not in formats and {DualRegion, GeluRegions, MagnitudeBands} - {gone} <= formats


def test_without_the_hessian_no_gradient_is_asked_for(w4a6, folder, registry):
    assert PTQ4RIS(metric="mse").needs == "model" and PTQ4RIS().needs == "gradients"
    plain = quantized(folder, registry, "ptq4ris-w4a4", "allocator.input_bits=6", 'allocator.metric="mse"')[2].model.state_dict()
    assert any(not torch.equal(t, plain[n]) for n, t in w4a6[2].model.state_dict().items())


def test_the_allocator_says_what_is_wrong():
    with pytest.raises(SpecError, match="weight_bits is 2 to 8"):
        PTQ4RIS(weight_bits=9)
    with pytest.raises(SpecError, match="softmax is one of dual, uniform"):
        PTQ4RIS(softmax="none")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="0 < least < most"):
        PTQ4RIS(least=2.0)


def test_patterns_that_name_nothing_are_an_error(folder, registry):
    with pytest.raises(SpecError, match="is called x, y"):
        quantized(folder, registry, "ptq4ris-w4a4", 'allocator.searched=["x"]', 'allocator.text=["y"]')


def test_source_and_task_keep_their_contracts(folder, registry):
    check_source(LavtSource(), f"lavt:{folder}")
    loaded = load_source(f"lavt:{folder}", registry.sources)
    # a model that is right: one with random weights may come nearer to the truth by chance when noise is added
    check_task(loaded.data.task(), lambda batch: 8.0 * torch.stack([~batch["target"], batch["target"]], -1).float())


def test_the_float_model_scores_as_itself(folder, registry, tmp_path):
    loaded = load_source(f"lavt:{folder}", registry.sources)
    task, forward = loaded.data.task(), float_forward(loaded, adapter_for(loaded.model, registry.adapters))
    scores = task.evaluate(forward, task.reference(forward, tmp_path / "reference"))
    assert scores["kl"] == 0 and scores["top1"] == 1 and scores["miou"] == scores["miou_reference"] and scores["sentences"] == 12


@pytest.mark.parametrize(
    "recipe", ["lavt-w8a8", "lavt-w6a6", "lavt-w4a8", "lavt-w4a4", "ptq4ris-w8a8", "ptq4ris-w6a6", "ptq4ris-w4a8", "ptq4ris-w4a4"]
)
def test_plans_of_all_recipes(folder, recipe, capsys):
    assert main(["plan", f"lavt:{folder}", "--recipe", recipe, "--set", "calibration.samples=4", "--set", "calibration.batch=2"]) == 0
    assert "conv1_1.weight (rule" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_the_command_line_quantizes_and_verifies(folder, tmp_path, capsys):
    options = [x for o in FAST for x in ("--set", o)]
    assert main(["quantize", f"lavt:{folder}", "--recipe", "ptq4ris-w6a6", *options, "-o", str(tmp_path / "out")]) == 0
    assert "split train" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0
