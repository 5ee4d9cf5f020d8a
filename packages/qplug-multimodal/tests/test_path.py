"""The whole path on the small trained model: plan, quantize, save, load; what was decided is there again."""

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.model import adapter_for, load_source
from qcore.modules.stream_norm import StreamNorm
from qcore.pipeline import quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qplug_multimodal import scenes
from qplug_multimodal.aifs import policy_of
from qplug_multimodal.msq import ModalInput
from qplug_multimodal.rms import RotatedSum

REGISTRY = load_registry()
SETTINGS = ("calibration.samples=16", "calibration.batch=16")


def _quantized(recipe, *overrides):
    loaded = load_source("multimodal:tiny-llava", REGISTRY.sources)
    adapter = adapter_for(loaded.model, REGISTRY.adapters)
    own = load_recipe(recipe, REGISTRY, (*overrides, *SETTINGS))
    return loaded, adapter, quantize_model(loaded, own, loaded.data.batches(own.calibration), registry=REGISTRY, adapter=adapter)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    loaded, adapter, q = _quantized("mquant-w4a8")
    folder = tmp_path_factory.mktemp("mquant") / "out"
    save(q.model, folder, registry=REGISTRY, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
    return adapter, q, load(folder, registry=REGISTRY)


def _batch(n=20):
    d = scenes.dialogues(n, scenes.EVALUATION)
    return {"input_ids": d.input_ids, "pixel_values": d.pixel_values}


@torch.no_grad()
def test_what_was_saved_is_what_is_loaded(saved):
    adapter, q, again = saved
    assert torch.equal(adapter.outputs(again, _batch()), adapter.outputs(q.model, _batch()))


def test_policies_and_modules_survive_the_file(saved):
    _, q, again = saved
    assert policy_of(again.model.language_model) is not None
    for model in (q.model, again):
        kinds = [type(m) for m in model.modules()]
        # pre_layrnorm and two norms for each of two layers; seven linears in each of two layers
        assert kinds.count(StreamNorm) == 5 and kinds.count(ModalInput) == 14
    assert [type(m) for m in again.modules()].count(RotatedSum) == [type(m) for m in q.model.modules()].count(RotatedSum)
    scales = [m.scale for m in again.modules() if isinstance(m, ModalInput)]
    assert all((s > 0).all() for s in scales) and any(s[0] != s[1] for s in scales)


@torch.no_grad()
def test_the_quantized_model_answers_as_the_float_one_does(saved):
    _, _, again = saved
    d = scenes.dialogues(100, scenes.EVALUATION)
    logits = again(input_ids=d.input_ids, pixel_values=d.pixel_values, use_cache=False).logits[:, :-1]
    right = (logits.argmax(-1) == d.input_ids[:, 1:])[d.answers[:, 1:]].double().mean()
    assert right > 0.75  # float: 0.83


@torch.no_grad()
def test_the_loaded_model_decodes_with_its_cache_as_without(saved):
    _, _, again = saved
    batch = _batch(3)
    long = again.generate(**batch, max_new_tokens=4, do_sample=False)
    logits = again(input_ids=long, pixel_values=batch["pixel_values"], use_cache=False).logits
    start = batch["input_ids"].shape[1]
    assert torch.equal(logits[:, start - 1 : -1].argmax(-1), long[:, start:])


def test_no_input_of_the_language_model_is_dynamic(saved):
    """Everything static: the specs in the checkpoint say so."""
    _, q, _ = saved
    for module in q.model.modules():
        if isinstance(module, ModalInput):
            assert module.spec.when == "static"
        activation = getattr(module, "activation", None)
        if activation is not None and hasattr(activation, "when"):
            assert activation.when == "static"


def test_a_row_with_a_large_mean_is_split_and_saved(tmp_path):
    loaded = load_source("multimodal:tiny-llava", REGISTRY.sources)
    adapter = adapter_for(loaded.model, REGISTRY.adapters)
    own = load_recipe("mquant-w4a8", REGISTRY, SETTINGS)
    name = next(n for n in loaded.reader.names() if n.endswith("layers.0.mlp.fc2.weight"))
    original = loaded.reader[name]

    class Shifted:
        """The weights, with a mean in every row of one layer."""

        def __init__(self, reader):
            self.names, self.reader = reader.names, reader

        def __contains__(self, key):
            return key in self.reader

        def __getitem__(self, key):
            return self.reader[key] + original.std() if key == name else self.reader[key]

    loaded.reader = Shifted(loaded.reader)
    q = quantize_model(loaded, own, loaded.data.batches(own.calibration), registry=REGISTRY, adapter=adapter)
    path = name.removesuffix(".weight")
    leaf = q.model.get_submodule(path)
    assert isinstance(leaf, RotatedSum) and leaf.fine.shape == (64, 1) and leaf.coarse.shape == (64, 256)
    # two static scales of inputs: that of the channel of means does not stretch the others'
    assert leaf.fine.activation.when == leaf.coarse.activation.when == "static"
    save(q.model, tmp_path / "out", registry=REGISTRY, source=loaded.source, adapter=adapter.name, companions=loaded.write_companions)
    with torch.no_grad():
        assert torch.equal(adapter.outputs(load(tmp_path / "out", registry=REGISTRY), _batch(4)), adapter.outputs(q.model, _batch(4)))


@pytest.mark.parametrize("recipe", ["mquant-w4a8", "mquant-w8a8", "mquant-w4a4", "vlm-static-w4a8", "vlm-dynamic-w4a8"])
def test_every_recipe_plans_without_a_problem(recipe):
    loaded = load_source("multimodal:tiny-llava", REGISTRY.sources)
    adapter = adapter_for(loaded.model, REGISTRY.adapters)
    plan = make_plan(loaded, load_recipe(recipe, REGISTRY), adapter, REGISTRY)
    assert not plan.problems
    said = any("static scales by modality" in note for note in plan.notes)
    assert said == recipe.startswith("mquant")


def test_ranges_by_percentile_are_an_option_of_the_recipe():
    recipe = load_recipe("mquant-w4a8", REGISTRY, ('transforms.5.observer={name="percentile"}', "rules.1.observer.name=percentile"))
    assert recipe.transforms[5].observer.name == recipe.rules[1].observer.name == "percentile"
