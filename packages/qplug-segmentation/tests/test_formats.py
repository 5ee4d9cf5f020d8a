"""Laws of the formats: DRQ in its select form, GELU regions, RORQ."""

import math

import pytest
import torch
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import QuantSpec, Unscaled, fake_quantize
from qcore.testing import check_format
from qplug_segmentation.formats import GELU_LOW, DualRegion, GeluRegions, MagnitudeBands, StepGrid
from qplug_segmentation.regions import OutlierBands, affine_grid, best_split, symmetric_grid
from torch import Tensor


def rounded(fmt, x: Tensor) -> Tensor:
    return fmt.decode(fmt.encode(x))


def probabilities(rows: int = 400, keys: int = 144) -> Tensor:
    """Rows of a softmax over `keys` keys, logits of deviation 2."""
    return (torch.randn(rows, keys, generator=torch.Generator().manual_seed(0)) * 2).softmax(-1)


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("shift", [0, 1, 4, 9, 19])
def test_dual_regions_keep_the_contract_of_formats(bits, shift):
    check_format(DualRegion(bits, shift))


@pytest.mark.parametrize(
    "fmt",
    [
        *(StepGrid(b, 0.037, f) for b, f in ((8, -128), (4, -5), (6, 0))),
        *(GeluRegions(b, s) for b in (8, 6, 4) for s in (0.02, 0.5)),
        MagnitudeBands(4, (1.0, 5.0, 40.0), (2 / 15, 10 / 15, 80 / 15), (7, 8, 8)),
        MagnitudeBands(8, (1.0,), (2 / 255,), (128,)),
    ],
    ids=str,
)
def test_the_others_keep_the_contract_of_formats(fmt):
    check_format(fmt)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("shift", range(20))
def test_dual_region_is_monotone_exact_at_both_ends_and_its_steps_differ_by_a_shift(bits, shift):
    fmt = DualRegion(bits, shift)
    x = torch.cat([torch.linspace(0, 1, 20001), torch.logspace(-7, 0, 2001)]).sort().values
    assert bool((rounded(fmt, x).diff() >= 0).all())
    assert rounded(fmt, torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    steps = (1 / fmt.levels) / (fmt.split / fmt.levels)
    assert math.log2(steps) == shift


def test_dual_region_equals_the_papers_selection_away_from_the_split():
    fmt = DualRegion(8, 4)
    x = probabilities().flatten()
    x = x[(x - fmt.split).abs() > 1 / fmt.levels]
    paper = torch.where(x >= fmt.split, (x * 127).round() / 127, (x * 127 / fmt.split).round() * fmt.split / 127)
    assert torch.allclose(rounded(fmt, x), paper, atol=1e-7, rtol=0)  # τ/Q is rounded once, or τ and Q one after the other


def test_the_papers_selection_is_not_monotone_at_small_splits_and_ours_is_never_worse():
    q, tau = 127, 2.0**-9
    select = lambda x: torch.where(x >= tau, (x * q).round() / q, (x * q / tau).round() * tau / q)
    below, at = torch.tensor(tau * 0.999), torch.tensor(tau)
    assert select(below) > 0 and select(at) == 0
    x = probabilities()
    for bits, shift in ((8, 3), (8, 9), (4, 2)):
        fmt, q, tau = DualRegion(bits, shift), 2 ** (bits - 1) - 1, 2.0**-shift
        assert (rounded(fmt, x) - x).square().sum() <= (select(x) - x).square().sum() + 1e-12


@pytest.mark.parametrize(
    ("bits", "select_mse", "uniform_mse", "sum_mse"), [(8, 9.2e-8, 1.6e-7, 1.05e-6), (6, 1.35e-6, 2.05e-6, 1.2e-5), (4, 1.9e-5, 2.5e-5, 1.2e-4)]
)
def test_one_region_at_a_time_beats_uniform_and_the_released_sum_is_worse_than_both(bits, select_mse, uniform_mse, sum_mse):
    """The order of the three, and their factors within what other rows of a softmax give (figures of the literature were measured on other rows)."""
    p = probabilities()
    q = 2 ** (bits - 1) - 1

    def released(shift: int) -> Tensor:
        tau = 2.0**-shift
        return (p.clamp(tau, 1) * q).round() / q + (p.clamp(0, tau) * q / tau).round() * tau / q

    ours = float((rounded(best_split(p, bits), p) - p).square().mean())
    levels = 2**bits - 1
    tops = [f * float(p.max()) for f in torch.linspace(0.1, 1.0, 91).tolist()]
    uniform = min(float(((p * levels / t).round().clamp(0, levels) * t / levels - p).square().mean()) for t in tops)
    summed = min(float((released(i) - p).square().mean()) for i in range(20))
    assert ours < uniform < summed
    assert summed / ours > 0.4 * sum_mse / select_mse
    assert uniform / ours > 0.7 * uniform_mse / select_mse


def test_gelu_regions_round_negatives_four_hundred_times_better_and_the_whole_worse():
    x = torch.nn.functional.gelu(torch.randn(200_000, generator=torch.Generator().manual_seed(1)))
    fmt = GeluRegions(8, float(x.max()) / 127.5)
    affine = affine_grid(float(x.min()), float(x.max()), 8)
    negative = x < 0
    error, plain = (rounded(fmt, x) - x).square(), (rounded(affine, x) - x).square()
    assert error[negative].mean() * 200 < plain[negative].mean()
    assert error.mean() > plain.mean()
    assert abs(float(torch.nn.functional.gelu(torch.tensor(-0.7517915925, dtype=torch.float64))) + GELU_LOW) < 1e-12


def outliers(n: int = 200_000) -> Tensor:
    """Gaussian values, 0.2 % of them forty times as large."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, generator=g)
    return torch.where(torch.rand(n, generator=g) < 0.002, 40 * x, x)


@pytest.mark.parametrize("rule", ["nearest", "band"])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_bands_rise_err_by_half_a_step_and_never_clamp_a_larger_outlier_to_the_first_band(bits, rule):
    x = outliers()
    fmt = OutlierBands().fit(x, bits, rule)
    assert len(fmt.thresholds) > 1 and all(a < b for a, b in zip(fmt.thresholds, fmt.thresholds[1:], strict=False))
    band = torch.bucketize(x.abs(), torch.tensor(fmt.thresholds[:-1]))
    step = torch.tensor(fmt.steps)[band]
    # an affine grid's ends move by up to half a step when its zero point is rounded
    assert bool(((rounded(fmt, x) - x).abs() <= step * (1.0 + 1e-4)).all())
    inside = x.abs() < 0.9 * fmt.thresholds[0]
    assert bool(((rounded(fmt, x[inside]) - x[inside]).abs() <= step[inside] / 2 * (1 + 1e-4)).all())
    unseen = torch.tensor([2 * fmt.thresholds[-1], -2 * fmt.thresholds[-1]])
    assert bool((rounded(fmt, unseen).abs() > 0.9 * fmt.thresholds[-1]).all())


def test_values_without_outliers_are_one_band_and_that_is_the_affine_grid():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(3)) * 3 - 1
    fmt = OutlierBands().fit(x, 6)
    grid = affine_grid(float(x.min()), float(x.max()), 6)
    assert len(fmt.thresholds) == 1 and fmt.bits == 6
    assert torch.equal(rounded(fmt, x), rounded(grid, x))


@pytest.mark.parametrize(("bits", "uniform", "bands"), [(8, 2.0e-2, 7.3e-5), (6, 2.1e-1, 1.2e-3), (4, 2.5e-1, 2.1e-2)])
def test_bands_of_outliers_have_the_normalized_error_of_the_literature(bits, uniform, bands):
    x = outliers()
    own = affine_grid(float(x.min()), float(x.max()), bits)
    nmse = lambda fmt: float((rounded(fmt, x) - x).square().sum() / x.square().sum())
    assert uniform / 4 < nmse(own) < 4 * uniform
    paper = nmse(OutlierBands(bands=3).fit(x, bits, "band"))
    assert bands / 4 < paper < 4 * bands
    assert nmse(OutlierBands(bands=3).fit(x, bits)) <= paper
    assert paper * 5 < nmse(own)


def test_bits_of_bands_count_the_number_of_the_band():
    assert MagnitudeBands(6, (1.0, 2.0, 3.0), (0.1, 0.2, 0.3), (0, 0, 0)).bits == 8
    assert MagnitudeBands(6, (1.0, 2.0), (0.1, 0.2), (0, 0)).bits == 7


def test_a_spec_without_a_scale_says_all_and_runs_as_an_activation():
    x = probabilities()
    spec = QuantSpec(format=DualRegion(8, 5), granularity=Unscaled())
    assert torch.equal(fake_quantize(x, spec), rounded(DualRegion(8, 5), x))


def test_formats_say_what_is_wrong():
    with pytest.raises(SpecError, match="2 to 8 bits, got bits=9"):
        DualRegion(9, 1)
    with pytest.raises(SpecError, match="shift = 0 … 19, got shift=20"):
        DualRegion(8, 20)
    with pytest.raises(SpecError, match="thresholds rise"):
        MagnitudeBands(4, (2.0, 1.0), (0.1, 0.1), (0, 0))
    with pytest.raises(SpecError, match="positive step"):
        StepGrid(8, 0.0, 0)
    with pytest.raises(CalibrationError, match="finite values"):
        OutlierBands().thresholds(torch.tensor([1.0, torch.inf]))


def test_symmetric_grid_has_the_step_of_ptq4vit():
    assert symmetric_grid(2.0, 8).step == 2.0 / 127.5 and symmetric_grid(2.0, 8).first == -128
