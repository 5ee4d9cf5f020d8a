import pytest
import torch
from qcore.errors import SpecError
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.testing import check_transform, fit_transform
from qcore.testing.models import TinyDecoderAdapter, randomize, tiny_cnn, tiny_decoder, tiny_mlp, tokens
from qcore.transforms import CrossLayerEqualize, apply_rewrite
from torch import nn


def ranges(w, axis):
    return w.detach().abs().movedim(axis, 0).flatten(1).amax(1)


def test_both_sides_of_a_link_get_the_same_range():
    net = randomize(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))).double().eval()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-2, 2, 24).unsqueeze(1)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    rewrite = check_transform(CrossLayerEqualize(), PlainMLP(), net, [x])
    twin = apply_rewrite(net, rewrite)
    before = (ranges(net[0].weight, 0) * ranges(net[2].weight, 1)).sqrt()
    torch.testing.assert_close(ranges(twin[0].weight, 0), before)
    torch.testing.assert_close(ranges(twin[2].weight, 1), before)


def test_chains_converge():
    net = tiny_mlp().double()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-2, 2, 24).unsqueeze(1)
    twin = apply_rewrite(net, fit_transform(CrossLayerEqualize(sweeps=50, tolerance=1e-6), PlainMLP(), net, []))
    for a, b in ((0, 2), (2, 4)):
        torch.testing.assert_close(ranges(twin[a].weight, 0), ranges(twin[b].weight, 1), rtol=1e-4, atol=0)


def test_equalizing_keeps_cnns_and_decoders():
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert check_transform(CrossLayerEqualize(), PlainCNN(), tiny_cnn(batch_norm=False), [x]).edits
    assert check_transform(CrossLayerEqualize(), TinyDecoderAdapter(), tiny_decoder(bias=True), [tokens()]).edits


def test_keys_and_queries_are_equalized_in_rope_pairs():
    by = fit_transform(CrossLayerEqualize(), TinyDecoderAdapter(), tiny_decoder(), []).edits["model.layers.0.self_attn.k_proj.weight"]
    t = by[0].by.unflatten(0, (2, 2, 4))  # heads, halves of 8 channels
    assert torch.equal(t[:, 0], t[:, 1])


def test_an_unfolded_batch_norm_is_noted():
    rewrite = fit_transform(CrossLayerEqualize(), PlainCNN(), tiny_cnn(), [])
    assert rewrite.notes and all("only vectors write it" in note for note in rewrite.notes)


def test_dead_channels_keep_their_scale():
    net = tiny_mlp()
    with torch.no_grad():
        net[0].weight[2] = 0
        net[2].weight[:, 5] = 0
    by = fit_transform(CrossLayerEqualize(), PlainMLP(), net, []).edits["0.weight"][0].by
    assert by[2] == 1 and by[5] == 1 and bool(torch.isfinite(by).all())


def test_sweeps_are_checked():
    with pytest.raises(SpecError, match="at least 1 sweep"):
        CrossLayerEqualize(sweeps=0)
