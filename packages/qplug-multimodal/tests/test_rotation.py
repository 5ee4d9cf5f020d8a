"""Tower, connector and language model, rotated end to end: the logits stay."""

import copy

import pytest
import torch
from qcore.modules.stream_norm import StreamNorm
from qcore.plugins import load_registry
from qcore.testing.adapters import deviation, outputs, to_double
from qcore.transforms import FoldNorm, HadamardRotate, apply_rewrite
from qcore.transforms.layer_norm import LayerNormToRMS
from qplug_multimodal.adapter import VisionLanguage
from qplug_multimodal.testing import composed, llava_batch, qwen_batch, tiny_llava, tiny_qwen2_vl

LLAVA = llava_batch((3, "i", 4), (2, "i", 5))
QWEN = qwen_batch((3, "i", 4), (2, "i", 1, "i", 2))
STEPS = (FoldNorm(), LayerNormToRMS(), HadamardRotate(online=("*.fc2:weight", "*.down_proj:weight")))
MODULES = dict(load_registry().modules)
MODELS = pytest.mark.parametrize(
    ("make", "batch"),
    [(tiny_llava, LLAVA), (lambda: tiny_llava("siglip"), LLAVA), (tiny_qwen2_vl, QWEN)],
    ids=["llava", "llava-siglip", "qwen2-vl"],
)


@MODELS
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_the_whole_model_is_rotated_and_keeps_its_function(make, batch, dtype, limit):
    model, adapter = make().to(dtype), VisionLanguage()
    adapter.prepare(model)
    x = to_double(batch) if dtype is torch.float64 else batch
    # the sum of a thousand products in another order: float32 keeps 1e-5 of the largest logit
    assert deviation(outputs(adapter, apply_rewrite(model, composed(STEPS, model), MODULES), x), outputs(adapter, model, x)) <= limit


def test_every_norm_of_the_tower_is_replaced_and_the_merger_is_folded_in_fours():
    model = tiny_qwen2_vl().double()
    rewrite = composed(STEPS, model)
    norms = {path: i.module for path, i in rewrite.inserts.items() if i.module.type == StreamNorm.name}
    assert sorted(norms) == sorted(["model.visual.merger.ln_q", *(f"model.visual.blocks.{i}.norm{j}" for i in range(2) for j in (1, 2))])
    assert all(m.config["centred"] and not m.config["matrix"] for m in norms.values())
    port = next(p for e in rewrite.edits["model.visual.merger.mlp.0.weight"] if (p := e.port).axis == "in")
    assert port.repeat == 4
    # producers have no mean over their outputs any more, before they are rotated
    centred = composed((FoldNorm(), LayerNormToRMS(rotate=False)), model)
    moved = apply_rewrite(model, centred, MODULES)
    for name in ("patch_embed.proj", "blocks.0.attn.proj", "blocks.1.mlp.fc2"):
        layer = moved.get_submodule(f"model.visual.{name}")
        assert layer.weight.mean(0).abs().max() < 1e-15
        assert layer.bias is None or layer.bias.mean().abs() < 1e-15
        before = model.get_submodule(f"model.visual.{name}")
        assert before.weight.mean(0).abs().max() > 1e-3


def test_a_tower_whose_stream_is_read_itself_keeps_its_mean():
    rewrite = composed(STEPS, tiny_llava().double())
    norms = {path: i.module for path, i in rewrite.inserts.items() if i.module.type == StreamNorm.name}
    assert norms and not any(m.config["centred"] for m in norms.values())
    assert [path for path, m in norms.items() if m.config["matrix"]] == ["model.vision_tower.pre_layrnorm"]
    assert any("reads the stream itself" in note for note in rewrite.notes)


def test_the_language_stream_is_rotated_at_both_of_its_sources():
    model = tiny_llava().double()
    rewrite = composed(STEPS, model)
    for name in (
        "model.language_model.embed_tokens.weight",
        "model.multi_modal_projector.linear_2.weight",
        "model.multi_modal_projector.linear_2.bias",
    ):
        assert any(e.port.axis == "out" for e in rewrite.edits[name]), name
    # the connector left out: what a routine for text models alone would do
    broken = copy.deepcopy(rewrite)
    for name in list(broken.edits):
        if "multi_modal_projector.linear_2" in name:
            del broken.edits[name]
    adapter, x = VisionLanguage(), to_double(LLAVA)
    adapter.prepare(model)
    gap = deviation(outputs(adapter, apply_rewrite(model, broken, MODULES), x), outputs(adapter, model, x))
    assert gap > 1e-2
