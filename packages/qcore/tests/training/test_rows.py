"""Laws of coded rows and of their products in integers.

Defects of other codecs of this family that are asked about below: groups that straddle rows, and shared exponents by the ceiling of the logarithm
(DeepWok/mase 321); the exponent of amax divided by the largest number (vllm 43557); a padded length that is lost (HomericIntelligence/Odyssey 1909);
codes that do not come back, and subnormal numbers (tt-metal 51971); midpoints away from even (ROCm/aiter 3992).
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qcore.numbers import FP8_E4M3, Codebook, Int, NumberFormat, PerChannel, PerGroup, PerTensor, PerToken, PowerOfTwo, QuantSpec, Tile, Unscaled
from qcore.numbers.formats import NO_PARAMS
from qcore.numbers.tensor import fake_quantize
from qcore.plugins import load_registry
from qcore.testing import check_format
from qcore.training import accumulator_bits, code_rows, group_of, integer_product, levels_of
from torch import Tensor


def gse(bits: int, bias: str = "ieee", rounding: str = "nearest", group: int = 32) -> QuantSpec:
    """GSE-INTb, its formats by name, as a recipe has them."""
    formats = load_registry().formats
    if "bfp" not in formats:
        pytest.skip("qplug-hardware is not installed")
    shared = formats["shared-exponent"](5)
    above = QuantSpec(format=PowerOfTwo(), granularity=Unscaled())
    scale = QuantSpec(format=shared, granularity=Unscaled()) if bias == "ieee" else QuantSpec(format=shared, granularity=PerTensor(), scale=above)
    return QuantSpec(format=formats["bfp"](bits - 1, rounding), granularity=PerGroup(group), scale=scale)


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Values over many orders of magnitude."""
    return torch.randn(rows, columns, generator=g(seed)) * 2.0 ** torch.randint(-12, 6, (rows, columns), generator=g(seed + 1))


SPECS = [("gse", b) for b in (4, 5, 6, 8, 13)] + [("trunc", 6), ("tensor", 6), ("int8", 8), ("int4", 4)]


def spec_of(kind: str, bits: int) -> QuantSpec:
    if kind.startswith("int"):
        return QuantSpec(format=Int(bits), granularity=PerGroup(32))
    return gse(bits, bias="tensor" if kind == "tensor" else "ieee", rounding="truncate" if kind == "trunc" else "nearest")


@pytest.mark.parametrize(("kind", "bits"), SPECS)
def test_values_equal_fake_quantize_bit_for_bit(kind, bits):
    spec = spec_of(kind, bits)
    for seed in range(3):
        x = lively(5, 96, seed)
        assert torch.equal(code_rows(x, spec).values(), fake_quantize(x, spec))


@pytest.mark.parametrize(("kind", "bits"), SPECS)
def test_coding_values_again_changes_nothing(kind, bits):
    spec = spec_of(kind, bits)
    once = code_rows(lively(4, 64), spec).values()
    assert torch.equal(code_rows(once, spec).values(), once)


@given(st.integers(1, 3), st.integers(1, 100), st.sampled_from([5, 6, 8]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_shared_exponents_keep_every_value_within_half_a_step_and_the_sign(rows, columns, bits, seed):
    spec = gse(bits)
    x = torch.randn(rows, columns, generator=g(seed))
    coded = code_rows(x, spec)
    step = coded.steps().repeat_interleave(32, 1)[:, :columns]
    error = (coded.values() - x).abs()
    corner = x.abs() > (2 ** (bits - 1) - 1) * step  # would round up to 2^(b-1) levels
    assert bool((error <= torch.where(corner, step, step / 2)).all())
    assert torch.equal(code_rows(-x, spec).values(), -coded.values())
    assert torch.equal(code_rows(4 * x, spec).values(), 4 * coded.values())


def test_groups_never_reach_into_the_next_row_and_padding_is_lost_again():
    spec = gse(8)
    x = lively(3, 40)
    x[1] *= 2.0**8  # were a group to straddle, its neighbours would lose their small values
    whole = code_rows(x, spec)
    assert whole.levels.shape == (3, 2, 32) and whole.values().shape == (3, 40)
    for i in range(3):
        assert torch.equal(whole.values()[i], code_rows(x[i : i + 1], spec).values()[0])
    assert int(whole.levels[:, 1, 8:].abs().sum()) == 0


@pytest.mark.parametrize("x", [1.0, 1.5, 1.999, 2.0, 3.0, 3.99, 6.0, 7.0, 0.75])
def test_the_shared_exponent_is_the_floor_of_the_logarithm(x):
    """Neither its ceiling, nor the exponent of amax over the largest number."""
    coded = code_rows(torch.tensor([[x] + [0.0] * 31]), gse(8))
    assert coded.steps().item() == 2.0 ** (int(torch.tensor(x).log2().floor()) - 6)


def test_midpoints_go_to_the_even_level_on_both_sides_of_zero():
    x = torch.tensor([[64.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5] + [0.0] * 25])  # step 1 in 8 bits
    assert code_rows(x, gse(8)).levels[0, 0, 1:7].tolist() == [0, 2, 2, 0, -2, -2]
    assert code_rows(x, gse(8, rounding="truncate")).levels[0, 0, 1:7].tolist() == [0, 1, 2, 0, -1, -2]


def test_subnormal_numbers_and_zeros_have_codes_and_nan_has_none():
    tiny = torch.full((1, 32), 2.0**-140)
    assert torch.equal(code_rows(tiny, gse(8)).values(), torch.zeros(1, 32))
    assert code_rows(torch.zeros(2, 32), gse(8)).zero_groups() == 2
    assert float(code_rows(torch.full((1, 32), 1e-30), gse(8, "tensor")).values()[0, 0]) == pytest.approx(1e-30, rel=2**-7)
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(SpecError, match="first at"):
            code_rows(torch.tensor([[1.0, bad]]), gse(8))


def test_an_empty_group_does_not_move_the_exponent_bias_of_a_gradient():
    x = torch.randn(4, 64, generator=g(0)) * 2.0**-40
    x[2] = 0
    coded = code_rows(x, gse(8, "tensor"))
    assert torch.equal(coded.values()[[0, 1, 3]], code_rows(x[[0, 1, 3]], gse(8, "tensor")).values())
    assert coded.zero_groups() == 2
    # nor where the numbers' own `quantize` rounds it
    assert torch.equal(fake_quantize(x, gse(8, "tensor")), coded.values())


def test_the_fixed_exponent_range_loses_small_gradients_and_the_tensors_own_keeps_them():
    x = torch.randn(8, 64, generator=g(0)) * 2.0**-30
    assert code_rows(x, gse(6)).zero_groups() == 16 and code_rows(x, gse(6, "tensor")).zero_groups() == 0


def test_stochastic_rounding_is_unbiased_and_follows_its_generator():
    x = torch.cat([torch.full((1, 1), 64.0), torch.linspace(0.05, 3.95, 31).reshape(1, -1)], 1)
    many = torch.stack([code_rows(x, gse(8), "stochastic", g(i)).values() for i in range(600)])
    assert (many.mean(0) - x).abs().max() < 0.08  # four standard errors of a coin: 4 · 0.5 / sqrt(600)
    assert torch.equal(many[0], code_rows(x, gse(8), "stochastic", g(0)).values())
    with pytest.raises(SpecError, match="generator"):
        code_rows(x, gse(8), "stochastic")


@pytest.mark.parametrize("k", [32, 100, 1024])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_integer_products_equal_those_of_the_values_exactly(k, bits):
    for seed, make in ((0, lively), (1, lambda r, c, s: torch.randn(r, c, generator=g(s)))):
        p, q = code_rows(make(6, k, seed), gse(bits)), code_rows(make(5, k, seed + 9), gse(bits))
        assert torch.equal(integer_product(p, q), p.values().double() @ q.values().double().T)


@given(st.sampled_from([4, 5, 6, 8]), st.sampled_from([4, 6, 8]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_no_sum_of_a_group_exceeds_the_accumulator(a, b, seed):
    extreme = torch.randint(0, 2, (4, 32), generator=g(seed)).float() * 2 - 1
    p, q = code_rows(extreme * 1.999, gse(a)), code_rows(extreme * 1.999, gse(b))
    sums = torch.einsum("rgi,sgi->rsg", p.levels.long(), q.levels.long()).abs()
    assert int(sums.max()) == 32 * (2 ** (a - 1) - 1) * (2 ** (b - 1) - 1) < 2 ** accumulator_bits(p.spec, q.spec, 32)


def test_accumulators_of_the_paper():
    assert [32 * (2 ** (b - 1) - 1) ** 2 for b in (6, 8)] == [30752, 516128]
    assert accumulator_bits(gse(6), gse(6), 32) == 15 and accumulator_bits(gse(8), gse(8), 32) == 19


@dataclass(frozen=True)
class Wide(NumberFormat):
    """16 bits, too many for a group of 2^16 products in an int32."""

    name: ClassVar[str] = "wide"
    bits: int = 16
    lo = -32767.0
    hi = 32767.0
    code_dtype = torch.int32

    def encode(self, x, params=NO_PARAMS):
        return x.round().clamp(self.lo, self.hi).int() & 0xFFFF

    def decode(self, codes, params=NO_PARAMS):
        c = codes.int()
        return torch.where(c >= 32768, (c - 65536).clamp(min=-32767), c).float()


def test_products_that_do_not_meet_or_do_not_fit_are_refused():
    wide = QuantSpec(format=Wide(), granularity=PerGroup(32))
    x = code_rows(lively(2, 64), wide)
    with pytest.raises(SpecError, match="int32 holds 31"):
        integer_product(x, x)
    with pytest.raises(SpecError, match="do not meet"):
        integer_product(code_rows(lively(2, 64), gse(8)), code_rows(lively(2, 96), gse(8)))


def test_formats_without_even_numbers_are_refused():
    for fmt in (FP8_E4M3, Codebook(4), Int(1)):
        with pytest.raises(SpecError):
            levels_of(fmt)
    assert (levels_of(Int(8)).lowest, levels_of(Int(8)).highest, levels_of(Int(8)).spacing) == (-128, 127, 1.0)


def test_groups_are_parts_of_rows():
    assert group_of(QuantSpec(format=Int(8), granularity=PerToken()), 40) == 40
    assert group_of(QuantSpec(format=Int(8), granularity=Tile(1, 16)), 40) == 16
    for granularity in (PerTensor(), PerChannel(-1), Tile(2, 16)):
        with pytest.raises(SpecError, match="inside a row"):
            group_of(QuantSpec(format=Int(8), granularity=granularity), 40)


def test_normal_float_is_a_format_and_nf4_has_the_published_numbers():
    from statistics import NormalDist

    from qcore.numbers.normal_float import NormalFloat

    check_format(NormalFloat())
    # bitsandbytes' construction: eight quantiles above, seven below, evenly spaced in probability
    quantile = NormalDist().inv_cdf
    top = 0.9677083
    above = [quantile(0.5 + (top - 0.5) * i / 8) for i in range(1, 9)]
    below = [-quantile(0.5 + (top - 0.5) * i / 7) for i in range(7, 0, -1)]
    wanted = torch.tensor([*below, 0.0, *above]) / above[-1]
    assert torch.allclose(NormalFloat(4).decode(torch.arange(16, dtype=torch.uint8)), wanted, atol=2e-7)
