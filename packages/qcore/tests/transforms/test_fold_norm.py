import pytest
import torch
from qcore.model.plain import PlainMLP
from qcore.model.reader import DictReader
from qcore.testing import check_transform
from qcore.testing.models import TinyDecoderAdapter, randomize, tiny_decoder, tiny_gpt, tokens
from qcore.transforms import FoldNorm, apply_rewrite
from torch import nn

VARIANTS = [{}, {"bias": True}, {"norm_offset": 1.0}, {"tied": True}, {"norm_offset": 1.0, "tied": True, "bias": True}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_folding_keeps_the_function_and_leaves_gains_of_one(options):
    model = tiny_decoder(**options)
    rewrite = check_transform(FoldNorm(), TinyDecoderAdapter(), model, [tokens()])
    assert not rewrite.notes
    assert rewrite.unties == ({"lm_head.weight"} if options.get("tied") else set())
    twin = apply_rewrite(model, rewrite)
    for name, p in twin.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(p, torch.full_like(p, 1 - options.get("norm_offset", 0.0))), name


def test_layer_norm_biases_go_into_readers_that_have_one():
    model = tiny_gpt()
    rewrite = check_transform(FoldNorm(), TinyDecoderAdapter(), model, [tokens()])
    assert rewrite.notes == ("model.norm→lm_head: the norm keeps its bias: lm_head has no bias",)
    twin = apply_rewrite(model, rewrite)
    assert twin.model.layers[0].input_layernorm.bias.abs().max() == 0
    assert twin.model.norm.bias.abs().max() > 0


@pytest.mark.parametrize("value", [0.0, -0.7])
def test_a_gain_that_is_not_positive_is_folded_where_nothing_stands_between(value):
    model = tiny_decoder()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = value
    rewrite = check_transform(FoldNorm(), TinyDecoderAdapter(), model, [tokens()])
    assert not rewrite.notes
    column = apply_rewrite(model, rewrite).model.layers[0].self_attn.q_proj.weight[:, 3]
    torch.testing.assert_close(column, model.model.layers[0].self_attn.q_proj.weight[:, 3] * value)


def test_a_negative_gain_does_not_pass_an_activation():
    net = randomize(nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 4))).eval()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert check_transform(FoldNorm(), PlainMLP(), net, [x]).edits
    with torch.no_grad():
        net[1].weight[2] = -1
    rewrite = check_transform(FoldNorm(), PlainMLP(), net, [x])
    assert not rewrite.edits and "not positive" in rewrite.notes[0]


def test_a_zero_gain_with_a_bias_that_must_stay_is_left_alone():
    model = tiny_gpt()
    with torch.no_grad():
        model.model.norm.weight[0] = 0
    rewrite = check_transform(FoldNorm(), TinyDecoderAdapter(), model, [tokens()])
    assert "model.norm.weight" not in rewrite.edits
    assert any("zero" in note for note in rewrite.notes)


def test_folding_twice_is_folding_once():
    model = tiny_decoder(bias=True)
    topology = TinyDecoderAdapter().topology(model)
    once = apply_rewrite(model, FoldNorm().fit(topology, {}, {}, model, DictReader(model.state_dict())))
    assert FoldNorm().fit(topology, {}, {}, once, DictReader(once.state_dict())).empty
