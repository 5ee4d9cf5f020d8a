import pytest
import torch
from qcore.errors import CalibrationError, SpecError
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.model.reader import DictReader
from qcore.model.topology import Site
from qcore.numbers import int_weight
from qcore.testing import check_transform, fit_transform
from qcore.testing.conformance import observe
from qcore.testing.models import TinyDecoderAdapter, tiny_cnn, tiny_decoder, tiny_gpt, tiny_mlp, tokens
from qcore.transforms import SmoothQuant, apply_rewrite
from torch import nn


@pytest.mark.parametrize("options", [{}, {"bias": True, "kv_heads": 1}, {"norm_offset": 1.0, "tied": True}], ids=str)
def test_smoothing_keeps_a_decoder(options):
    assert check_transform(SmoothQuant(), TinyDecoderAdapter(), tiny_decoder(**options), [tokens()]).edits


def test_smoothing_keeps_layer_norms_with_biases():
    assert check_transform(SmoothQuant(), TinyDecoderAdapter(), tiny_gpt(), [tokens()]).edits


def test_smoothing_keeps_a_cnn_with_depthwise_and_grouped_convolutions():
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for net in (tiny_cnn(), tiny_cnn(batch_norm=False)):
        assert check_transform(SmoothQuant(), PlainCNN(), net, [x]).edits


def test_smoothing_follows_equation_4():
    net = tiny_mlp()
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    alpha = 0.7
    rewrite = fit_transform(SmoothQuant(alpha=alpha), PlainMLP(), net, [x])
    h = net[:2](x).detach().double().abs().amax(0)
    w = net[2].weight.detach().double().abs().amax(0)
    s = torch.where(h > 0, h**alpha / w ** (1 - alpha), 1.0)
    torch.testing.assert_close(apply_rewrite(net, rewrite)[0].bias.double() * s, net[0].bias.double(), rtol=1e-6, atol=1e-6)


def test_smoothing_evens_out_what_the_weights_see():
    model = tiny_decoder()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] *= 30  # an outlier channel, as large models have them
    adapter = TinyDecoderAdapter()
    twin = apply_rewrite(model, fit_transform(SmoothQuant(), adapter, model, [tokens()]))
    site = Site("model.layers.0.self_attn.q_proj", "input")

    def spread(m):
        from qcore.calibration.observers import AbsMax

        high = observe(adapter, m, {site: (AbsMax(),)}, [tokens()])[site]["absmax"]
        return float(high.max() / high.median())

    assert spread(twin) < 0.4 * spread(model)


def test_q_k_and_v_share_one_scale():
    rewrite = fit_transform(SmoothQuant(links="*input_layernorm*"), TinyDecoderAdapter(), tiny_decoder(), [tokens()])
    scales = [rewrite.edits[f"model.layers.0.self_attn.{n}_proj.weight"][0].by for n in "qkv"]
    assert torch.equal(scales[0], scales[1]) and torch.equal(scales[0], scales[2])


def test_dead_channels_keep_their_scale():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
        net[0].bias[1] = -1  # never fires
        net[2].weight[:, 3] = 0  # nobody weighs it
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    by = fit_transform(SmoothQuant(), PlainMLP(), net, [x]).edits["0.weight"][0].by
    assert by[1] == 1 and by[3] == 1 and bool(torch.isfinite(by).all())


def test_only_links_with_a_weight_to_quantize_are_touched():
    net = tiny_mlp()
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    rewrite = fit_transform(SmoothQuant(), PlainMLP(), net, [x], {Site("4"): int_weight(8)})
    assert set(rewrite.edits) == {"2.weight", "2.bias", "4.weight"}


def test_what_was_not_seen_is_named():
    model = tiny_decoder()
    topology = TinyDecoderAdapter().topology(model)
    with pytest.raises(CalibrationError, match=r"absmax.*q_proj:input"):
        SmoothQuant().fit(topology, {s: int_weight(8) for s in topology.sites}, {}, model, DictReader(model.state_dict()))


def test_alpha_is_checked():
    with pytest.raises(SpecError, match=r"1\.5"):
        SmoothQuant(alpha=1.5)
