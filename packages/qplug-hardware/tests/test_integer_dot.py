"""Dot products in integers: equal to those of the decoded values, and never wider than stated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qcore.numbers import Int, PerGroup, QTensor, QuantSpec, int_weight, mx, quantize
from qplug_hardware.block_float import BBFP, BFP, bbfp, bfp, gse
from qplug_hardware.integer_dot import accumulator_bits, block_dots, element_product, fields, matmul
from torch import Tensor

PAIRS = [(1, 0), (3, 1), (4, 2), (4, 3), (6, 3), (8, 4), (10, 5), (12, 0)]
SPECS = [*(bbfp(*p) for p in PAIRS), bfp(4), gse(8)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Normal values, one in twenty forty times as large."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.where(torch.rand(*shape, generator=g) < 0.05, 40.0, 1.0)


@pytest.mark.parametrize("a", SPECS, ids=lambda s: str(s.format))
@pytest.mark.parametrize("b", [bbfp(4, 2), bbfp(10, 5), gse(6)], ids=lambda s: str(s.format))
def test_a_blocks_sum_is_the_dot_product_of_what_the_codes_stand_for(a, b):
    x, y = quantize(rand(5, 96), a), quantize(rand(7, 96, seed=1), b)
    sums, exponents = block_dots(x, y)
    assert sums.dtype == torch.int64 and sums.shape == exponents.shape == (5, 7, 3)
    decoded = torch.einsum("rgi,sgi->rsg", x.dequantize().double().unflatten(1, (3, 32)), y.dequantize().double().unflatten(1, (3, 32)))
    assert torch.equal(torch.ldexp(sums.double(), exponents), decoded)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s.format))
def test_a_matrix_product_is_exact(spec):
    """Against Python's own whole numbers, which never round."""
    from fractions import Fraction

    x, y = quantize(rand(3, 128), spec), quantize(rand(4, 128, seed=2), spec)
    left, right = x.dequantize().tolist(), y.dequantize().tolist()
    exact = [[float(sum(Fraction(p) * Fraction(q) for p, q in zip(r, s, strict=True))) for s in right] for r in left]
    assert matmul(x, y).tolist() == exact


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_gse_products_equal_those_of_the_decoded_matrices_up_to_1024_columns(bits):
    x, y = quantize(rand(4, 1024), gse(bits)), quantize(rand(6, 1024, seed=3), gse(bits))
    assert torch.equal(matmul(x, y), x.dequantize().double() @ y.dequantize().double().T)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PAIRS), st.integers(0, 1000))
def test_products_shifted_by_their_flags_add_up_to_the_same_sum(pair, seed):
    """What a processing element does, value by value: mantissas multiplied first and moved afterwards."""
    fmt = BBFP(*pair)
    x, y = quantize(rand(1, 32, seed=seed), bbfp(*pair)), quantize(rand(1, 32, seed=seed + 1), bbfp(*pair))
    ours = [list(zip(*(f[0].tolist() for f in fields(q.codes, fmt)), strict=True)) for q in (x, y)]
    total = sum(element_product(p, q, (fmt.shift, fmt.shift)) for p, q in zip(*ours, strict=True))
    assert block_dots(x, y)[0].item() == total


def extreme(fmt, spec: QuantSpec, block: int, sign: int) -> QTensor:
    """A block of the largest magnitude that there is."""
    code = int(fmt.encode(torch.tensor([sign * fmt.hi])).item())
    q = quantize(torch.zeros(1, block), QuantSpec(format=spec.format, granularity=PerGroup(block), scale=spec.scale))
    return QTensor(q.spec, {**q.parts, "codes": torch.full_like(q.codes, code)}, q.shape)


@pytest.mark.parametrize("block", [1, 8, 32, 33])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s.format))
def test_the_widest_sum_needs_the_stated_width_and_fits_it(spec, block):
    fmt = spec.format
    width = accumulator_bits(fmt, fmt, block)
    top = ((1 << fmt.mantissa) - 1) << getattr(fmt, "shift", 0)
    for signs in ((1, 1), (1, -1)):
        got = block_dots(extreme(fmt, spec, block, signs[0]), extreme(fmt, spec, block, signs[1]))[0].item()
        assert got == signs[0] * signs[1] * block * top * top
        assert abs(got) < 1 << width
    if fmt.mantissa > 2 and block in (8, 32):
        assert block * top * top >= 1 << (width - 1)  # a bit less would overflow


def test_the_bounds_of_gse_are_the_published_ones():
    assert [32 * ((1 << (b - 1)) - 1) ** 2 for b in (6, 8)] == [30752, 516128]
    assert [accumulator_bits(BFP(b - 1), BFP(b - 1), 32) for b in (6, 8)] == [15, 19]
    assert accumulator_bits(BBFP(4, 2), BBFP(4, 2), 32) == 2 * 4 + 2 * 2 + 5


def test_flagged_products_have_their_low_bits_empty():
    """Which is why a short carry chain suffices."""
    fmt = BBFP(6, 3)
    q = quantize(rand(8, 32), bbfp(6, 3))
    rows = zip(*(f.flatten().tolist() for f in fields(q.codes, fmt)), strict=True)
    for row in rows:
        product = element_product(row, row, (3, 3))
        assert product % (1 << (2 * 3 * row[1])) == 0


def test_zero_blocks_give_zero_and_other_formats_are_refused():
    zero = quantize(torch.zeros(2, 64), bbfp(4, 2))
    assert not matmul(zero, quantize(rand(3, 64), bbfp(4, 2))).any()
    q = quantize(rand(2, 64), bbfp(4, 2))
    with pytest.raises(SpecError, match="are of bfp and bbfp"):
        block_dots(q, quantize(rand(2, 64), mx(Int(8))))
    with pytest.raises(SpecError, match="do not meet"):
        block_dots(q, quantize(rand(2, 64), bbfp(4, 2, group=16)))
    with pytest.raises(SpecError, match="no powers of two"):
        matmul(q, quantize(rand(2, 64), QuantSpec(format=BBFP(4, 2), granularity=PerGroup(32), scale="float32")))
    with pytest.raises(SpecError, match="more than the 63"):
        wide = bbfp(12, 0, group=1 << 16)
        block_dots(quantize(rand(1, 1 << 16), wide), quantize(rand(1, 1 << 16), wide))
    with pytest.raises(SpecError, match="are of bfp and bbfp"):
        accumulator_bits(int_weight(4).format, BFP(4), 32)
