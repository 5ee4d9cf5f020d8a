import pytest
import torch
from qcore.calibration.observers import Gram, Moments
from qcore.errors import SpecError
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.model.reader import DictReader
from qcore.model.topology import Site
from qcore.numbers import int_weight
from qcore.testing import check_transform, fit_transform
from qcore.testing.conformance import observe
from qcore.testing.models import TinyDecoderAdapter, randomize, tiny_cnn, tiny_decoder, tiny_gpt, tokens
from qcore.transforms import AWQScale, benefit
from torch import nn


def uneven(seed=0):
    """A two-layer network whose hidden channels differ in energy, and inputs that are correlated."""
    g = torch.Generator().manual_seed(seed)
    net = randomize(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32)), seed).eval()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-1.5, 1, 64).unsqueeze(1)
        net[0].bias *= torch.logspace(-1.5, 1, 64)
    x = torch.randn(512, 16, generator=g) @ torch.randn(16, 16, generator=g)
    return net, x


def predicted(net, x, rewrite, spec):
    site = Site("2")
    seen = observe(PlainMLP(), net, {site.input: (Gram(),)}, [x])
    return benefit(rewrite, {site: spec}, seen, net, DictReader(net.state_dict()))


@pytest.mark.parametrize("options", [{}, {"bias": True, "kv_heads": 1}, {"norm_offset": 1.0, "tied": True}], ids=str)
def test_scaling_keeps_a_decoder(options):
    assert check_transform(AWQScale(grid=5), TinyDecoderAdapter(), tiny_decoder(**options), [tokens()]).edits


def test_scaling_keeps_layer_norms_and_convolutions():
    assert check_transform(AWQScale(grid=5), TinyDecoderAdapter(), tiny_gpt(), [tokens()]).edits
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert check_transform(AWQScale(grid=5), PlainCNN(), tiny_cnn(batch_norm=False), [x]).edits


@pytest.mark.parametrize("spec", [int_weight(4, 32), int_weight(3, 16, asymmetric=True), int_weight(4)], ids=str)
def test_scaling_lowers_the_gram_error_on_correlated_inputs_of_uneven_energy(spec):
    net, x = uneven()
    rewrite = fit_transform(AWQScale(), PlainMLP(), net, [x], {Site("2"): spec})
    assert predicted(net, x, rewrite, spec).reduction > 0.15


@pytest.mark.parametrize("seed", range(4))
def test_scaling_never_hurts_by_its_own_measure(seed):
    net = randomize(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), seed).eval()
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(seed))
    spec = int_weight(3, 16)
    rewrite = fit_transform(AWQScale(), PlainMLP(), net, [x], {Site("2"): spec})
    assert predicted(net, x, rewrite, spec).reduction >= -1e-6


def test_the_best_scale_is_one_of_the_grid():
    net, x = uneven()
    rewrite = fit_transform(AWQScale(), PlainMLP(), net, [x], {Site("2"): int_weight(4, 32)})
    s = rewrite.edits["2.weight"][0].by
    mean = observe(PlainMLP(), net, {Site("2").input: (Moments(),)}, [x])[Site("2").input]["moments"].mean_abs
    candidates = []
    for step in range(20):
        c = (mean ** (step / 20)).clamp(min=1e-4)
        candidates.append(c / (c.max() * c.min()).sqrt())
    assert any(torch.allclose(s, c) for c in candidates)
    torch.testing.assert_close(s.max() * s.min(), torch.tensor(1.0, dtype=torch.float64))


def test_the_grid_is_checked():
    with pytest.raises(SpecError, match="at least 2"):
        AWQScale(grid=1)
