"""BFP, BBFP and shared exponents: the laws of the encoding, then its cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qcore.numbers import Int, PerGroup, PowerOfTwo, QuantSpec, Tile, Unscaled, fake_quantize, mx, quantize
from qcore.testing import check_format
from qplug_hardware.block_float import BBFP, BFP, LARGEST, SharedExponent, bbfp, bfp, encode_windows, gse
from torch import Tensor

PAIRS = [(m, o) for m in range(1, LARGEST + 1) for o in range(m)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kinds() -> dict[str, Tensor]:
    """[64, 256] each: normal, heavy-tailed, and normal with one value in a hundred twenty times as large."""
    g = torch.Generator().manual_seed(3)
    normal = torch.randn(64, 256, generator=g)
    t3 = torch.randn(64, 256, generator=g) / (torch.randn(64, 256, 3, generator=g).square().mean(-1)).sqrt()
    outliers = torch.randn(64, 256, generator=g) * torch.where(torch.rand(64, 256, generator=g) < 0.01, 20.0, 1.0)
    return {"normal": normal, "t3": t3, "outliers": outliers}


def nmse(x: Tensor, spec: QuantSpec) -> float:
    return float((fake_quantize(x, spec) - x).square().sum() / x.square().sum())


def literal(x: Tensor, m: int, o: int, promote: bool) -> Tensor:
    """Section 2.2 written out in Python's own numbers, one value after the other: blocks [B, 32] float → decoded float64."""
    import math

    out = []
    for block in x.double().tolist():
        exponents = [math.frexp(abs(v))[1] - 1 for v in block if v]
        shared = max(-15, min(16, max(exponents) - (m - o))) if exponents else 0
        low = 2.0 ** (shared - (m - 1))
        for v in block:
            flag = v != 0 and math.frexp(abs(v))[1] - 1 > shared
            size = round(abs(v) / (low * 2 ** ((m - o) * flag)))  # Python rounds halves to even
            if promote and not flag and size == 2**m:
                flag, size = True, 2**o
            out.append(math.copysign(min(size, 2**m - 1) * low * 2.0 ** ((m - o) * flag), v))
    return torch.tensor(out, dtype=torch.float64).reshape(x.shape)


@pytest.mark.parametrize(("m", "o"), PAIRS)
def test_bbfp_keeps_the_contract_of_a_format(m, o):
    check_format(BBFP(m, o))


@pytest.mark.parametrize("m", range(1, LARGEST + 1))
def test_bfp_keeps_the_contract_of_a_format(m):
    check_format(BFP(m))


@pytest.mark.parametrize("fmt", [SharedExponent(), SharedExponent(4), SharedExponent(7), SharedExponent(5, bias=20)], ids=str)
def test_shared_exponents_keep_the_contract_of_a_format(fmt):
    check_format(fmt)


@pytest.mark.parametrize("corner", ["promote", "clip"])
@pytest.mark.parametrize(("m", "o"), [(1, 0), (3, 1), (4, 2), (4, 3), (6, 3), (6, 5), (8, 4), (10, 5)])
def test_every_value_is_what_the_definition_gives(m, o, corner):
    x = torch.cat([k.reshape(-1, 32) for k in kinds().values()])[::7]
    spec = QuantSpec(format=BBFP(m, o, corner), granularity=PerGroup(32), scale=bbfp(m, o).scale)
    assert torch.equal(fake_quantize(x, spec).double(), literal(x, m, o, corner == "promote"))


@pytest.mark.parametrize("corner", ["promote", "clip"])
@pytest.mark.parametrize(("m", "o"), [(3, 1), (4, 2), (6, 3), (8, 4)])
def test_what_was_decoded_is_encoded_to_the_same_codes(m, o, corner):
    spec = QuantSpec(format=BBFP(m, o, corner), granularity=PerGroup(32), scale=bbfp(m, o).scale)
    for x in kinds().values():
        once = quantize(x, spec)
        # the same exponents, for a block of zeros and small values may have another largest magnitude when it is read again
        again = quantize(once.dequantize(), spec, {"scale.codes": once.parts["scale.codes"]})
        assert torch.equal(once.codes, again.codes)


def test_what_was_decoded_has_the_same_exponents_too():
    """The largest magnitude M·2^k of a block keeps its exponent, for M has all m bits or rounds up to the next."""
    for m, o in [(3, 1), (4, 2), (6, 3), (8, 4)]:
        for x in kinds().values():
            values = fake_quantize(x, bbfp(m, o))
            assert torch.equal(fake_quantize(values, bbfp(m, o)), values)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8, 10])
def test_windows_that_coincide_are_block_floating_point(m):
    x = torch.cat([k.reshape(-1, 32) for k in kinds().values()])
    values = fake_quantize(x, bfp(m))
    scale = quantize(x, bfp(m)).scale()
    sign, _, size = encode_windows(x / scale, m, 0)
    assert torch.equal(torch.where(sign, -1.0, 1.0) * size * 2.0 ** (1 - m) * scale, values)


@pytest.mark.parametrize("m", [2, 3, 4, 5, 6, 7])
def test_bfp_is_the_cores_mx_of_integers_but_for_the_lowest_code(m):
    """Two's complement has -2^m, which a signed magnitude has not: one step apart there, the same bits everywhere else."""
    x = torch.cat([k.reshape(-1, 32) for k in kinds().values()])
    ours, theirs = fake_quantize(x, bfp(m)), fake_quantize(x, mx(Int(m + 1)))
    lowest = quantize(x, mx(Int(m + 1))).codes == -(1 << m)
    assert lowest.any()
    assert torch.equal(ours[~lowest], theirs[~lowest])
    step = quantize(x, bfp(m)).scale() * 2.0 ** (1 - m)
    assert torch.equal((ours - theirs)[lowest], step.expand_as(x)[lowest])


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_gse_integers_are_what_their_definition_gives(bits):
    x = torch.cat([k.reshape(-1, 32) for k in kinds().values()]).double()
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True))[1] - 1
    step = 2.0 ** (exponent.double() - (bits - 2))
    values = torch.sign(x) * (x.abs() / step).round().clamp(max=2 ** (bits - 1) - 1) * step
    assert torch.equal(fake_quantize(x.float(), gse(bits)).double(), values)
    assert gse(bits) == bfp(bits - 1)
    far = (fake_quantize(x.float(), gse(bits)).double() - x).abs()
    corner = (x.abs() / step).round() == 2 ** (bits - 1)
    assert bool((far <= torch.where(corner, step, step / 2)).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(-8, 6), st.sampled_from([(3, 1), (4, 2), (6, 3), (8, 4)]), st.integers(0, 1000))
def test_a_power_of_two_moves_the_exponents_and_no_code(k, pair, seed):
    x = rand(4, 64, seed=seed).clamp(-8, 8)
    x[0, 0], x[1, 32] = 1.0, 0.0
    spec = bbfp(*pair)
    one, other = quantize(x, spec), quantize(x * 2.0**k, spec)
    assert torch.equal(one.codes, other.codes)
    moved = other.parts["scale.codes"].int() - one.parts["scale.codes"].int()
    assert bool((moved == k).all())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PAIRS), st.integers(0, 1000))
def test_signs_change_nothing_else(pair, seed):
    x = rand(4, 32, seed=seed)
    assert torch.equal(fake_quantize(-x, bbfp(*pair)), -fake_quantize(x, bbfp(*pair)))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(PAIRS), st.lists(st.floats(-1000, 1000, width=32), min_size=32, max_size=32))
def test_errors_are_half_a_step_of_the_window_that_holds_the_value(pair, values):
    m, o = pair
    x = torch.tensor([values])
    q = quantize(x, bbfp(m, o))
    scale = q.scale()
    step = scale * 2.0 ** (1 - m)
    high = x.abs() >= 2 * scale
    bound = torch.where(high, step * 2.0 ** (m - o), step) / 2
    # at the top of the high window there is no next number to round up to
    clipped = x.abs() > scale * BBFP(m, o).hi
    assert bool(((q.dequantize() - x).abs() <= torch.where(clipped, 2 * bound, bound)).all())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([p for p in PAIRS if p[0] <= 8]), st.integers(0, 1000))
def test_a_larger_value_never_gets_a_smaller_number(pair, seed):
    x = rand(1, 256, seed=seed).sort(-1).values
    spec = QuantSpec(format=BBFP(*pair), granularity=PerGroup(256), scale=bbfp(*pair).scale)
    assert bool((fake_quantize(x, spec).diff() >= 0).all())


def test_promotion_is_exact_and_clipping_is_a_step_below():
    """BBFP(4,2), largest value 4: e_s = 0, steps 1/8 and 1/2.  1.95 = 15.6 steps rounds to 16, which is 2.0, flagged; a literal encoder keeps 15."""
    x = torch.tensor([[4.0, 1.95, -1.95, 1.9]])
    spec = QuantSpec(format=BBFP(4, 2), granularity=PerGroup(4), scale=bbfp(4, 2).scale)
    clip = QuantSpec(format=BBFP(4, 2, "clip"), granularity=PerGroup(4), scale=bbfp(4, 2).scale)
    assert fake_quantize(x, spec).tolist() == [[4.0, 2.0, -2.0, 1.875]]
    assert fake_quantize(x, clip).tolist() == [[4.0, 1.875, -1.875, 1.875]]
    assert quantize(x, spec).codes.tolist() == [[0b0_1_1000, 0b0_1_0100, 0b1_1_0100, 0b0_0_1111]]
    assert quantize(x, spec).scale().tolist() == [[1.0]]


def test_promotion_never_hurts():
    for m, o in PAIRS:
        for x in kinds().values():
            clip = QuantSpec(format=BBFP(m, o, "clip"), granularity=PerGroup(32), scale=bbfp(m, o).scale)
            assert bool(((fake_quantize(x, bbfp(m, o)) - x).abs() <= (fake_quantize(x, clip) - x).abs()).all())


def test_zeros_stay_zero_and_have_no_sign():
    x = torch.zeros(2, 64)
    x[1, :32] = rand(32)
    x[1, 5] = -0.0
    for spec in (bbfp(4, 2), bfp(4), gse(6, bias="tensor")):
        q = quantize(x, spec)
        assert not q.codes[0].any() and not q.codes[1, 32:].any() and q.codes[1, 5] == 0
        assert not torch.signbit(q.dequantize()[0]).any()


def test_one_value_of_a_block_alone_is_kept_to_its_own_mantissa():
    x = torch.zeros(1, 32)
    x[0, 7] = -3.0
    assert torch.equal(fake_quantize(x, bbfp(3, 1)), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad):
    x = torch.ones(2, 32)
    x[1, 3] = bad
    with pytest.raises(SpecError, match=r"1 of 64 values are NaN or infinite \(first at \(1, 3\)\)"):
        quantize(x, bbfp(4, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BBFP(4, 4), "use format 'bfp'"),
        (lambda: BBFP(4, 5), "overlap=5"),
        (lambda: BBFP(4, -1), "overlap=-1"),
        (lambda: BBFP(0, 0), "mantissa=0"),
        (lambda: BBFP(LARGEST + 1, 2), f"1 to {LARGEST}"),
        (lambda: BBFP(4, 2, "wrap"), "promote, clip"),
        (lambda: BFP(0), "mantissa=0"),
        (lambda: BFP(4, "up"), "nearest, truncate"),
        (lambda: SharedExponent(8), "2 to 7 bits.*'e8m0'"),
        (lambda: SharedExponent(6, bias=128), "take a bias of -64 to 127"),
        (lambda: gse(5, bias="float"), "ieee, tensor"),
    ],
)
def test_impossible_formats_are_refused_by_name(make, words):
    with pytest.raises(SpecError, match=words):
        make()


def test_a_block_that_does_not_divide_is_refused_and_tiles_take_it():
    x = rand(3, 45)
    with pytest.raises(SpecError, match=r"group size 32 does not divide K=45"):
        quantize(x, bbfp(4, 2))
    ragged = QuantSpec(format=BBFP(4, 2), granularity=Tile(1, 32), scale=bbfp(4, 2).scale)
    assert quantize(x, ragged).scale().shape == (3, 2)
    padded = torch.cat([x, torch.zeros(3, 19)], 1)
    assert torch.equal(fake_quantize(x, ragged), fake_quantize(padded, bbfp(4, 2))[:, :45])


def test_exponents_saturate_at_both_ends():
    big, small = torch.full((1, 32), 2.0**25), torch.full((1, 32), 2.0**-30)
    top = BBFP(4, 2).hi * 2.0**16
    assert float(fake_quantize(big, bbfp(4, 2)).max()) == top == 2.0**19 * (15 / 8) / 2
    assert not fake_quantize(small, bbfp(4, 2)).any()
    # the lowest block: steps of 2^-15 · 2^-3
    assert float(fake_quantize(torch.full((1, 32), 2.0**-18), bbfp(4, 2)).max()) == 2.0**-18


def test_a_bias_for_the_tensor_keeps_gradients_that_five_bits_alone_lose():
    x = rand(8, 64) * 2.0**-40
    assert not fake_quantize(x, gse(8)).any()
    biased = fake_quantize(x, gse(8, bias="tensor"))
    assert torch.equal(biased, fake_quantize(x * 2.0**40, gse(8)) * 2.0**-40)
    codes = quantize(x, gse(8, bias="tensor")).parts["scale.codes"]
    assert int(codes.max()) == 31


def test_truncation_costs_three_to_four_times_the_squared_error():
    """Right shifts alone, on normal values: 6.8e-5 against 2.7e-4 at 8 bits were measured elsewhere."""
    x = rand(256, 256)
    for bits in (5, 6, 8):
        ratio = nmse(x, gse(bits, rounding="truncate")) / nmse(x, gse(bits))
        assert 3 < ratio < 4.2, (bits, ratio)


def test_bits_are_counted_exactly():
    for m, o in [(3, 1), (4, 2), (6, 3), (8, 4)]:
        assert bbfp(m, o).bits_per_value((64, 256)) == m + 2 + 5 / 32
    for bits in (5, 6, 8):
        assert gse(bits).bits_per_value((64, 256)) == bits + 5 / 32


def test_eight_bit_exponents_of_the_core_serve_as_well():
    mx_like = QuantSpec(format=BBFP(4, 2), granularity=PerGroup(32), scale=QuantSpec(format=PowerOfTwo(), granularity=Unscaled()))
    for x in kinds().values():
        assert torch.equal(fake_quantize(x, mx_like), fake_quantize(x, bbfp(4, 2)))


# what the format is for, with the thresholds that a specification set before anything was built -----------------------------------------------


def at_exponent(x: Tensor, m: int, o: int, below: int) -> Tensor:
    """`x` in BBFP(m, o) under a shared exponent that lies `below` the largest of the block."""
    top = x.unflatten(-1, (-1, 32)).abs().amax(-1)
    shared = torch.ldexp(torch.ones_like(top), torch.frexp(top)[1] - 1 - below)
    return quantize(x, bbfp(m, o), {"scale.codes": SharedExponent().encode(shared)}).dequantize()


@pytest.mark.parametrize("seed", range(3))
def test_bbfp_has_less_than_half_the_error_of_bfp_of_as_many_mantissa_bits(seed):
    """0.45 on normal values, 0.2 with one value in a hundred twenty times as large; BFP(4) has a bit less, so this is no comparison at one size."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(256, 1024, generator=g)
    outliers = normal * torch.where(torch.rand(256, 1024, generator=g) < 0.01, 20.0, 1.0)
    assert nmse(normal, bbfp(4, 2)) < 0.45 * nmse(normal, bfp(4))
    assert nmse(outliers, bbfp(4, 2)) < 0.2 * nmse(outliers, bfp(4))


def test_at_one_size_bbfp_wins_with_outliers_and_loses_without():
    """BFP(5) has the bits of BBFP(4,2), BFP(7) those of BBFP(6,3)."""
    x = kinds()
    for ours, plain in ((bbfp(4, 2), bfp(5)), (bbfp(6, 3), bfp(7))):
        assert ours.bits_per_value((64, 256)) == plain.bits_per_value((64, 256))
        assert nmse(x["outliers"], ours) < 0.6 * nmse(x["outliers"], plain)
        assert nmse(x["normal"], ours) > 1.2 * nmse(x["normal"], plain)


@pytest.mark.parametrize(("m", "o"), [(3, 1), (4, 2), (4, 3), (6, 3), (6, 4), (6, 5), (8, 4)])
def test_the_best_shared_exponent_is_m_minus_o_below_the_largest(m, o):
    x = kinds()["outliers"]
    errors = [float((at_exponent(x, m, o, d) - x).square().sum()) for d in range(m - o + 3)]
    assert min(range(len(errors)), key=errors.__getitem__) == m - o, errors
    # beyond it the largest values saturate
    assert errors[m - o + 1] > 5 * errors[m - o]
    assert torch.equal(at_exponent(x, m, o, m - o), fake_quantize(x, bbfp(m, o)))


def test_the_error_that_flags_save_is_that_of_unflagged_values():
    """Unflagged values have 4^-d of BFP's squared error, flagged ones all of it (section 2.4): (1 - f)·4^-d + f of it, with f weighed by errors."""
    x = kinds()["outliers"]
    for m, o in [(4, 2), (6, 3), (8, 4)]:
        q = quantize(x, bbfp(m, o))
        flagged = (q.codes.int() >> m) & 1 == 1
        plain, ours = (fake_quantize(x, bfp(m)) - x).square(), (q.dequantize() - x).square()
        # a value near the boundary may be flagged by its rounding alone, exactly
        assert float(ours[flagged].sum() / plain[flagged].sum()) == pytest.approx(1.0, rel=0.02)
        # under coarse steps most small values are rounded to zero, whose error is less than that of uniform rounding
        assert float(ours[~flagged].sum() / plain[~flagged].sum()) < 3 * 4.0 ** -(m - o)


def test_tables_tell_formats_of_equal_bits_apart():
    names = [str(spec) for spec in (bbfp(4, 2), bbfp(4, 3), bfp(5))]
    assert [name.split(" ")[0] for name in names] == ["bbfp(4,2)", "bbfp(4,3)", "bfp(5)"]
    assert {spec.format.bits for spec in (bbfp(4, 2), bbfp(4, 3), bfp(5))} == {6}
