"""A weight with large means is split before it is coded; others are rotated alone."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import fake_quantize, int_weight
from qcore.numbers.hadamard import hadamard
from qcore.plugins import load_registry
from qcore.testing.adapters import deviation, outputs, to_double
from qcore.testing.transforms import fit_transform
from qcore.transforms import apply_rewrite
from qplug_multimodal.adapter import VisionLanguage
from qplug_multimodal.rms import RotatedSum, SuppressMagnitude, large_means, mean_channel
from qplug_multimodal.testing import llava_batch, tiny_llava

MODULES = dict(load_registry().modules)
BATCH = llava_batch((3, "i", 4))


def _weight(mean: float, n: int = 16, d: int = 256) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean


def test_the_predicate_is_true_for_large_means_and_false_without():
    assert large_means(_weight(0.5)).all()
    assert not large_means(_weight(0.5) - _weight(0.5).mean(1, keepdim=True)).any()
    assert not large_means(_weight(0.0)).any()


def test_the_mean_of_a_row_lands_in_one_channel():
    """256 × 16 with mean 0.5: √256 · 0.5 = 8 in one channel, against about 3.3 = √(2 ln 256) in the others."""
    w = _weight(0.5) @ hadamard(256).double().T
    c = mean_channel(256)
    others = [i for i in range(256) if i != c]
    assert c is not None and torch.allclose(w[:, c].abs(), 16 * _weight(0.5).mean(1).abs())
    assert w[:, c].abs().max() > 2 * w[:, others].abs().max()


@pytest.mark.parametrize("d", [64, 96, 160, 256])
def test_the_channel_is_the_constant_row(d):
    c = mean_channel(d)
    if c is not None:
        assert (hadamard(d, normalize=False)[c].abs().sum() == d) and hadamard(d, normalize=False)[c].sum().abs() == d


def _errors(mean: float) -> tuple[float, float]:
    """(rotated, rotated and split): ‖Q(W) - W‖² at 4 bits for each output channel."""
    w = _weight(mean) @ hadamard(256).double().T
    c = mean_channel(256)
    whole = (fake_quantize(w, int_weight(4)) - w).square().sum()
    coarse, fine = w.clone(), w[:, [c]]
    coarse[:, c] = 0
    apart = (fake_quantize(coarse, int_weight(4)) - coarse).square().sum() + (fake_quantize(fine, int_weight(4)) - fine).square().sum()
    return float(whole), float(apart)


def test_a_split_has_less_error_where_the_predicate_holds():
    """An independent program measured 2.6 times less on such a matrix (256 × 16, mean 0.5)."""
    whole, apart = _errors(0.5)
    assert apart < whole / 2


def _with_means(mean: float):
    model = tiny_llava().double()
    for layer in model.model.vision_tower.encoder.layers:
        w = layer.mlp.fc2.weight
        w.data = w.data - w.data.mean(1, keepdim=True) + mean
    adapter = VisionLanguage()
    adapter.prepare(model)
    return model, adapter


@pytest.mark.parametrize(("mean", "when", "split"), [(0.2, "most", 2), (0.2, "any", 2), (0.2, "never", 0), (0.0, "most", 0), (0.0, "any", 0)])
def test_the_split_is_exact_and_follows_the_predicate(mean, when, split):
    model, adapter = _with_means(mean)
    rewrite = fit_transform(SuppressMagnitude(when=when), adapter, model, [])
    inserted = [i.module.type for i in rewrite.inserts.values()]
    # the connector reads layer -2 of three: two layers count
    assert inserted.count(RotatedSum.name) == split and inserted.count("hadamard") == 2 - split
    assert (when == "never") == (not rewrite.notes)
    x = to_double(BATCH)
    assert deviation(outputs(adapter, apply_rewrite(model, rewrite, MODULES), x), outputs(adapter, model, x)) < 1e-12


def test_the_main_leaf_does_not_see_the_channel_of_means():
    model, adapter = _with_means(0.2)
    rewrite = fit_transform(SuppressMagnitude(), adapter, model, [])
    split = apply_rewrite(model, rewrite, MODULES)
    seen = {}
    leaf = split.model.vision_tower.encoder.layers[0].mlp.fc2
    leaf.coarse.register_forward_pre_hook(lambda _, args: seen.update(coarse=args[0]))
    leaf.fine.register_forward_pre_hook(lambda _, args: seen.update(fine=args[0]))
    outputs(adapter, split, to_double(BATCH))
    assert (seen["coarse"][..., leaf.channel] == 0).all() and seen["fine"].shape[-1] == 1 and seen["fine"].abs().max() > 0
    assert (leaf.coarse.weight[:, leaf.channel] == 0).all()


def test_a_size_without_a_hadamard_matrix_is_padded_and_nothing_is_added():
    from qcore.model.topology import Site
    from qplug_multimodal.rms import _split

    linear = torch.nn.Linear(9, 4).double()
    model = torch.nn.Sequential(linear)
    padded = 12
    channel = mean_channel(padded)
    rewrite = _split(Site("0"), linear, padded, 0 if channel is None else channel)
    x = torch.randn(3, 9, dtype=torch.float64)
    assert torch.allclose(apply_rewrite(model, rewrite, MODULES)(x), model(x), atol=1e-12)


def test_nonsense_is_refused():
    with pytest.raises(SpecError, match="most or any"):
        SuppressMagnitude(when="sometimes")  # type: ignore[arg-type]
    model, adapter = _with_means(0.0)
    with pytest.raises(SpecError, match="no weight site matches"):
        SuppressMagnitude(sites=("*nothing",)).foresee(adapter.topology(model), {}, model)


def test_the_module_is_rebuilt_from_its_config():
    own = RotatedSum(torch.nn.Linear(12, 4), torch.nn.Linear(1, 4, bias=False), 9, 12, 0)
    other = RotatedSum.from_config(own.config())
    other.load_state_dict(own.state_dict())
    x = torch.randn(2, 9)
    assert torch.equal(own(x), other(x))
