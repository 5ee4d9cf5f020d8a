"""Searches: scales on weights and inputs by the weighted error of outputs; gradients that are none; solvers; percentiles."""

import pytest
import torch
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import Int, Offset, PerChannel, PerTensor, QuantSpec, fake_quantize, int_weight, quantize, scale_parts
from qcore.testing import check_observer, check_solver
from qplug_segmentation.capture import LayerRows, ProductRows, loss_of, require_slope, self_divergence, slopes
from qplug_segmentation.formats import DualRegion, GeluRegions, StepGrid
from qplug_segmentation.percentiles import BestPercentile
from qplug_segmentation.search import (
    Candidates,
    affine_family,
    gelu_family,
    on_scale,
    probability_family,
    rounded,
    search_layer,
    search_product,
    search_products,
    softmax_family,
    symmetric_family,
)
from qplug_segmentation.solvers import AffineSearch, AtATap, GivenScales

FEW = Candidates(count=24, rounds=3)
W4 = int_weight(4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def rows():
    g = generator()
    x = torch.randn(256, 24, generator=g) * torch.logspace(-0.5, 0.5, 24)
    return LayerRows(x, torch.randn(256, 12, generator=g) * torch.logspace(-2, 1, 256).unsqueeze(1))


@pytest.fixture
def weight():
    return torch.randn(12, 24, generator=generator(1)) * torch.logspace(-1, 0, 12).unsqueeze(1)


def weighted(rows, weight, scales, fmt) -> float:
    out = rounded(fmt, rows.x) @ on_scale(weight, torch.tensor(scales), W4).T
    return float(((out - rows.x @ weight.T).square() * rows.grad.square()).sum())


# gradients -------------------------------------------------------------------------------------------------------------------------------


def test_the_divergence_from_itself_has_no_gradient_and_the_release_takes_it():
    """`sequential=False`: every layer is still float when gradients are collected, so the released loss is that of a model and itself."""
    logits = torch.randn(500, 2, generator=generator())
    slope, noise = slopes(logits, "argmax")
    assert noise < 1e-13 and slope > 1e-2
    require_slope(slope, noise)
    with pytest.raises(CalibrationError, match="nothing to weigh errors with"):
        require_slope(noise, noise)
    assert float(self_divergence(logits).abs()) < 1e-4


@pytest.mark.parametrize("kind", ["argmax", "sampled"])
def test_losses_look_at_the_classes_and_not_at_the_width(kind):
    """The release's softmax over the last axis of [B, 2, H, W] makes every row of pixels compete; here a pixel's loss is its own."""
    logits = torch.randn(2, 4, 5, 2, generator=generator(), requires_grad=True)
    loss_of(logits.reshape(-1, 2), kind).backward()
    gradient = logits.grad.clone()
    assert torch.allclose(gradient.sum(-1), torch.zeros(2, 4, 5), atol=1e-6)
    other = logits.detach().clone()
    other[0, 0, 0] += torch.tensor([3.0, -1.0])
    other.requires_grad_(True)
    loss_of(other.reshape(-1, 2), "argmax").backward()
    again = torch.autograd.grad(loss_of(logits.reshape(-1, 2), "argmax"), logits)[0]
    moved = (other.grad - again).abs().amax(-1) > 1e-9
    assert moved[0, 0, 0] and int(moved.sum()) == 1


def test_a_model_that_is_certain_of_every_pixel_is_refused():
    logits = torch.tensor([[40.0, -40.0]]).repeat(100, 1)
    with pytest.raises(CalibrationError, match=r"allocator\.loss=sampled"):
        require_slope(*slopes(logits, "argmax"))


# layers ----------------------------------------------------------------------------------------------------------------------------------


def test_weights_on_scales_are_what_is_stored(weight):
    scales = torch.tensor([0.01, 0.02, 0.05])
    stored = GivenScales(tuple(scales.tolist())).solve(weight, W4, {}).dequantize()
    half = scales.half().float()
    assert torch.equal(stored, on_scale(weight, half, W4))
    assert torch.equal(stored, fake_quantize(weight, W4, {"scale": half.repeat_interleave(4).unsqueeze(1)}))


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_what_is_found_is_no_worse_than_any_single_move_from_it(rows, weight, groups):
    """The search is coordinate descent: at its end no candidate for the input, and none for the scale of one group, is better."""
    many = Candidates(count=24, rounds=20)
    found = search_layer(rows, weight, W4, 4, symmetric_family, many, groups)
    best = weighted(rows, weight, found.scales, found.input)
    for fmt in symmetric_family(rows.x, 4, many):
        assert best <= weighted(rows, weight, found.scales, fmt) * (1 + 1e-5)
    start = weight.abs().unflatten(0, (groups, -1)).amax((1, 2)) / 7.5
    for group in range(groups):
        for f in many.factors:
            scales = list(found.scales)
            scales[group] = float((start[group] * f).half())
            assert best <= weighted(rows, weight, scales, found.input) * (1 + 1e-5)


def test_the_search_beats_the_full_range_and_the_hessian_its_own_score(rows, weight):
    found = search_layer(rows, weight, W4, 4, symmetric_family, FEW)
    plain = search_layer(LayerRows(rows.x, None), weight, W4, 4, symmetric_family, FEW)
    full = [float((weight.abs().max() / 7.5).half())]
    best = weighted(rows, weight, found.scales, found.input)
    assert best < weighted(rows, weight, full, symmetric_family(rows.x, 4, Candidates(1, 1.0, 1.1))[0])
    assert best <= weighted(rows, weight, plain.scales, plain.input)


def test_the_size_of_the_gradient_does_not_matter(rows, weight):
    found = search_layer(rows, weight, W4, 6, symmetric_family, FEW, 3)
    tiny = search_layer(LayerRows(rows.x, rows.grad * 1e-12), weight, W4, 6, symmetric_family, FEW, 3)
    assert (found.scales, found.input) == (tiny.scales, tiny.input)


def test_families_have_the_ranges_that_they_say():
    x = torch.nn.functional.gelu(torch.randn(4000, generator=generator()))
    assert [f.shift for f in softmax_family(x, 8, FEW)] == list(range(20))
    gelu = gelu_family(x, 8, FEW)
    assert all(isinstance(f, GeluRegions) for f in gelu) and gelu[-1].step == pytest.approx(1.2 * float(x.max()) / 127.5)
    affine = affine_family(x, 8, FEW)
    assert affine[-1].hi == pytest.approx(1.2 * float(x.max()), rel=0.02)
    assert all(f.first == 0 for f in probability_family(x.abs(), 8, FEW))


# products --------------------------------------------------------------------------------------------------------------------------------


def test_both_operands_of_a_product_are_searched_in_turn():
    g = generator(2)
    p = (torch.randn(6, 2, 16, 16, generator=g) * 3).softmax(-1)
    v = torch.randn(6, 2, 16, 8, generator=g)
    grad = torch.randn(6, 2, 16, 8, generator=g)

    def error(a, b) -> float:
        return float(((rounded(a, p) @ rounded(b, v) - p @ v) * grad).square().sum())

    dual, own = search_product(p, v, grad, softmax_family(p, 4, FEW), symmetric_family(v, 4, FEW), 10)
    uniform, other = search_product(p, v, grad, probability_family(p, 4, FEW), symmetric_family(v, 4, FEW), 10)
    assert isinstance(dual, DualRegion) and isinstance(own, StepGrid)
    assert error(dual, own) < error(uniform, other)
    assert all(error(dual, own) <= error(f, own) * (1 + 1e-6) for f in softmax_family(p, 4, FEW))
    assert all(error(dual, own) <= error(dual, f) * (1 + 1e-6) for f in symmetric_family(v, 4, FEW))


def test_planted_statistics_of_two_towers_come_out_nearer_at_four_bits():
    """Softmax, GELU and outliers as a two-tower cross-attention has them: W4A4 with two regions and bands against one affine range for each."""
    from qplug_segmentation.regions import OutlierBands, affine_grid

    g = generator(3)
    text = torch.randn(64, 12, 32, generator=g)
    text = torch.where(torch.rand(text.shape, generator=g) < 0.003, 30 * text, text)
    pixels = torch.randn(64, 49, 32, generator=g)
    wk, wv, w1, w2 = (torch.randn(n, k, generator=g) / k**0.5 for n, k in ((32, 32), (32, 32), (64, 32), (32, 64)))

    def towers(text_in, p_in, gelu_in) -> torch.Tensor:
        t = text_in(text)
        p = p_in((pixels @ (t @ wk.T).transpose(1, 2) * 32**-0.5).softmax(-1))
        hidden = torch.nn.functional.gelu((p @ (t @ wv.T) + pixels) @ w1.T)
        return gelu_in(hidden) @ w2.T

    def keep(x: torch.Tensor) -> torch.Tensor:
        return x

    seen: dict[str, torch.Tensor] = {}
    towers(keep, lambda p: seen.setdefault("p", p), lambda h: seen.setdefault("h", h))
    target = towers(keep, keep, keep)

    def through(fmt):
        return lambda x: rounded(fmt, x)

    uniform = towers(*(through(affine_grid(float(x.min()), float(x.max()), 4)) for x in (text, seen["p"], seen["h"])))
    p_format = min(softmax_family(seen["p"], 4, FEW), key=lambda f: float((rounded(f, seen["p"]) - seen["p"]).square().sum()))
    found = search_layer(LayerRows(seen["h"].flatten(0, 1), None), w2, int_weight(8), 4, gelu_family, FEW)
    ours = towers(through(OutlierBands().fit(text, 4)), through(p_format), through(found.input))

    def cosine(y: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(y.flatten(), target.flatten(), dim=0))

    assert cosine(ours) > cosine(uniform)


def test_products_of_an_attention_get_four_formats():
    g = generator(4)
    q, k, v = (torch.randn(3, 2, 9, 4, generator=g) for _ in range(3))
    found = search_products(ProductRows(q, k, v, (q @ k.transpose(-1, -2)).softmax(-1), None, None), 6, softmax_family, Candidates(12, rounds=1))
    assert isinstance(found.p, DualRegion) and all(isinstance(f, StepGrid) and f.bits == 6 for f in (found.q, found.k, found.v))


# solvers and observers -------------------------------------------------------------------------------------------------------------------


def test_solvers_keep_the_contract():
    check_solver(GivenScales((0.05,)), int_weight(4))
    check_solver(AffineSearch(steps=20), int_weight(4, asymmetric=True))


def test_given_scales_say_where_they_do_not_fit(weight):
    with pytest.raises(SpecError, match="5 groups of rows do not divide N=12"):
        GivenScales((0.1,) * 5).solve(weight, W4, {})
    with pytest.raises(SpecError, match="granularity 'channel'"):
        GivenScales((0.1,)).solve(weight, QuantSpec(format=Int(4), granularity=PerTensor()), {})
    with pytest.raises(SpecError, match="positive"):
        GivenScales((0.1, -1.0))
    with pytest.raises(SpecError, match="a tap has no weight"):
        AtATap().solve(weight, W4, {})


@pytest.mark.parametrize("signed", [True, False])
def test_affine_search_is_no_worse_than_the_full_range_in_any_row(signed):
    w = torch.randn(16, 40, generator=generator(5)).exp() - 1.0  # lopsided rows
    w[0] = w[0].abs()
    w[1] = 0.0
    spec = QuantSpec(format=Int(4, signed), granularity=PerChannel(0), offset=Offset.CODE, scale="float16")
    error = lambda q: (q.dequantize() - w).abs().pow(2.4).sum(1)
    ours, full = error(AffineSearch().solve(w, spec, {})), error(quantize(w, spec))
    assert bool((ours <= full * (1 + 1e-5)).all()) and float(ours.sum()) < float(full.sum())
    assert bool((ours <= error(AffineSearch(reach=0).solve(w, spec, {})) * (1 + 1e-6)).all())
    assert float(ours[1]) == 0


def test_affine_search_wants_a_zero_point_for_each_row(weight):
    with pytest.raises(SpecError, match="offset 'code'"):
        AffineSearch().solve(weight, W4, {})
    with pytest.raises(SpecError, match="1 step or more"):
        AffineSearch(steps=0)


def test_best_percentile_keeps_the_contract_and_is_the_best_of_its_three():
    check_observer(BestPercentile())
    x = torch.randn(40_000, 1, generator=generator(6))
    x[:20] *= 60
    for bits in (8, 4):
        spec = QuantSpec(format=Int(bits), granularity=PerTensor(), offset=Offset.CODE)
        observer = BestPercentile().for_spec(spec)
        observer.update(x)
        errors = {}
        from qcore.calibration.observers import Percentile

        for q in observer.qs:
            one = Percentile(q=q)
            one.update(x)
            errors[one.result()] = float((fake_quantize(x, spec, scale_parts(*(e.reshape(1, 1) for e in one.result()), spec)) - x).square().sum())
        low, high = observer.result()
        best = min(errors, key=errors.__getitem__)
        assert torch.equal(low, best[0]) and torch.equal(high, best[1])
    with pytest.raises(SpecError, match="percentiles in"):
        BestPercentile(qs=(0.2,))


def test_given_scales_can_stand_in_a_recipe():
    from qcore.plugins import load_registry
    from qcore.recipe import Recipe, Rule
    from qcore.recipe_file import dump, parse_recipe

    recipe = Recipe(name="r", rules=(Rule("*:weight", W4),), solver=GivenScales((0.5, 0.25)))
    assert parse_recipe(dump(recipe), load_registry(), name="r") == recipe
