"""CLIP's two towers: their links are true, and both are rotated."""

import torch
from qcore.model import adapter_for
from qcore.modules.stream_norm import StreamNorm
from qcore.pipeline import quantize_model
from qcore.pipeline.floats import load_in_memory
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qcore.testing import check_adapter
from qcore.testing.adapters import deviation, outputs, to_double
from qcore.transforms import FoldNorm, HadamardRotate, apply_rewrite
from qcore.transforms.layer_norm import LayerNormToRMS
from qplug_multimodal.testing import clip_batch, composed, tiny_clip
from qplug_multimodal.two_tower import TwoTower

REGISTRY = load_registry()


def test_links_of_tiny_clip_are_true():
    check_adapter(TwoTower(), tiny_clip(), clip_batch())


def test_both_towers_are_rotated_and_scores_stay():
    model, x = tiny_clip().double(), to_double(clip_batch())
    adapter = adapter_for(model, REGISTRY.adapters)
    assert isinstance(adapter, TwoTower)
    adapter.prepare(model)
    rewrite = composed((FoldNorm(), LayerNormToRMS(), HadamardRotate(online=("*.fc2:weight",))), model, adapter=adapter)
    norms = {path: i.module for path, i in rewrite.inserts.items() if i.module.type == StreamNorm.name}
    # pre_layrnorm stands in the image tower's stream; everything else reads it through a norm, so both are centred
    assert len(norms) == 11 and all(m.config["centred"] for m in norms.values())
    assert [path for path, m in norms.items() if m.config["matrix"]] == ["vision_model.pre_layrnorm"]
    assert deviation(outputs(adapter, apply_rewrite(model, rewrite, dict(REGISTRY.modules)), x), outputs(adapter, model, x)) <= 1e-10


def test_clip_is_quantized_with_static_scales_in_memory():
    model, batch = tiny_clip(), clip_batch()
    adapter = TwoTower()
    reference = outputs(adapter, model, batch)
    rotations = '[{name="fold-norm"}, {name="layer-norm-to-rms"}, {name="hadamard", online=["*.fc2:weight"]}]'
    recipe = load_recipe("vlm-static-w4a8", REGISTRY, ("rules.0.format.bits=8", f"transforms={rotations}"))
    q = quantize_model(load_in_memory(model), recipe, [batch], registry=REGISTRY, adapter=adapter)
    y = outputs(adapter, q.model, batch)
    assert len(q.sites) == 24 and 0 < (y - reference).norm() / reference.norm() < 0.1
    assert torch.isfinite(y).all()
