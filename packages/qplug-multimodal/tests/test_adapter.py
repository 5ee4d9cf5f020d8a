"""The vision-language adapter tells the truth, and refuses what it does not know."""

import pytest
import torch
from qcore.model.topology import Port
from qcore.testing import check_adapter
from qplug_multimodal.adapter import VisionLanguage
from qplug_multimodal.testing import llava_batch, qwen_batch, tiny_llava, tiny_qwen2_vl
from torch import nn

LLAVA = llava_batch((3, "i", 4), (2, "i", 5))
QWEN = qwen_batch((3, "i", 4), (2, "i", 1, "i", 2))


def test_links_of_tiny_llava_are_true():
    check_adapter(VisionLanguage(), tiny_llava(), LLAVA)


def test_links_of_a_llava_that_reads_the_last_layer_are_true():
    check_adapter(VisionLanguage(), tiny_llava(feature_layer=-1), LLAVA)


@pytest.mark.slow
def test_links_of_a_llava_with_siglip_are_true():
    check_adapter(VisionLanguage(), tiny_llava("siglip"), LLAVA)


def test_links_of_tiny_qwen2_vl_are_true():
    check_adapter(VisionLanguage(), tiny_qwen2_vl(), QWEN)


def test_a_block_with_a_parameter_that_nobody_knows_is_refused_alone():
    """A layer scale, as InternVL has it: what lies in the block and the stream through it, and nothing else."""
    model, adapter = tiny_llava(), VisionLanguage()
    before = adapter.topology(model)
    model.model.vision_tower.encoder.layers[0].layer_scale = nn.Parameter(torch.ones(32))
    after = adapter.topology(model)
    assert after.sites == before.sites
    gone = {link.name for link in before.links} - {link.name for link in after.links}
    assert gone == {"vision residual", *(link.name for link in before.links if "vision_tower.encoder.layers.0" in link.name)}
    reasons = {str(port): why for port, why in after.blocked.items()}
    why = reasons["model.vision_tower.encoder.layers.0.mlp.fc1.weight.in"]
    assert "layer_scale is a parameter of the block that this adapter does not know" in why
    assert "model.vision_tower.encoder.layers.1.self_attn.out_proj.weight.out" in reasons


def test_a_norm_of_queries_is_refused_in_the_language_model():
    model, adapter = tiny_llava(), VisionLanguage()
    model.model.language_model.layers[1].self_attn.q_norm = nn.LayerNorm(12)
    names = {link.name for link in adapter.topology(model).links}
    assert "residual" not in names and "vision residual" in names
    assert not any("language_model.layers.1" in n for n in names) and any("language_model.layers.0" in n for n in names)


def test_a_connector_that_reads_several_layers_is_refused():
    model, adapter = tiny_llava(), VisionLanguage()
    model.config.vision_feature_layer = [1, 2]
    topology = adapter.topology(model)
    assert "vision residual" not in {link.name for link in topology.links}
    assert any("reads several layers" in why for why in topology.blocked.values())


def test_a_connector_that_reads_patches_in_an_unknown_order_is_refused():
    """Four patches behind each other without a norm that says so: a rotation of the stream would meet the wrong columns."""
    model, adapter = tiny_llava(), VisionLanguage()
    first = model.model.multi_modal_projector.linear_1
    model.model.multi_modal_projector.linear_1 = nn.Linear(4 * first.in_features, first.out_features)
    topology = adapter.topology(model)
    assert "vision residual" not in {link.name for link in topology.links}
    why = topology.blocked[Port("model.multi_modal_projector.linear_1.weight", "in")]
    assert "reads 128 channels, and the stream has 32" in why


def test_layers_that_nothing_reads_are_no_sites():
    topology = VisionLanguage().topology(tiny_llava())
    assert not any("encoder.layers.2" in str(site) for site in topology.sites)
    why = topology.blocked[Port("model.vision_tower.encoder.layers.2.mlp.fc1.weight", "in")]
    assert "nothing reads" in why
