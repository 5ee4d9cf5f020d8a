"""The integer operators against float64: the golden bounds, what was measured for the paper's variants, and the edges of a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qcore.numbers import quantize
from qcore.numbers.spec import int_weight
from qplug_llm.illm.dyadic import Dyadic, Wide, aligned, constant, dyadic_scale, dyadic_weight, limited, requantize, step, wide_of
from qplug_llm.illm.operators import add, argmax, di_clipped_softmax, di_exp, di_matmul, di_norm, di_swiglu, mix, product, rotate, sigmoid
from torch import Tensor


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def coded(x: Tensor, bits: int = 8) -> Dyadic:
    """Values as a row-wise quantized tensor."""
    return requantize(wide_of(x), bits)


def scalar(value: int) -> Tensor:
    return torch.tensor([value])


# scales ----------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2**40), st.integers(1, 255), st.integers(-20, 60), st.sampled_from([3, 15, 255, 65535])), min_size=1))
def test_a_step_has_eight_bits_and_is_nearest(rows):
    for delta, m, k, levels in rows:
        m_new, k_new = (int(t) for t in step(scalar(delta), scalar(m), scalar(k), levels))
        assert 128 <= m_new <= 255
        # delta·m / (levels·2^k) against m'/2^k', within half a step of m' (a whole one where 256 was halved)
        exact, found = delta * m * 2 ** (k_new + 40 - k), m_new * levels * 2**40
        assert abs(exact - found) <= levels * 2**39 * (1 + 2 * (m_new == 128))


def test_requantized_rows_are_within_one_and_a_bit_of_their_steps():
    x = normal(200, 64)
    q = coded(x)
    steps = torch.ldexp(q.m.double(), -q.k.double())
    assert float(((q.dequantize() - x) / steps).abs().max()) <= 1.5  # half of the code, up to 0.39 % of 255 of the scale
    assert int(q.codes.min()) == 0 and int(q.codes.max()) == 255 and bool(((q.zp >= 0) & (q.zp <= 255)).all())


def test_a_row_of_zeros_and_constant_rows_keep_their_values():
    rows = torch.tensor([[0, 0, 0], [7, 7, 7], [-7, -7, -7], [2**45, 2**45, 2**45]])
    q = requantize(Wide(rows, torch.ones(4, 1).long(), torch.zeros(4, 1).long()), 8)
    assert q.codes[0].tolist() == [0, 0, 0] and int(q.zp[0]) == 0
    assert (q.dequantize() - rows).abs().div(rows.abs().clamp(min=1)).max() <= 2**-8


def test_a_row_far_from_zero_has_a_zero_point_inside_its_codes():
    q = requantize(Wide(torch.tensor([[1000, 1001]]), scalar(1)[None], scalar(0)[None]), 8)
    assert int(q.zp) == 0 and q.codes.tolist() == [[255, 255]]


def test_aligning_keeps_exact_values_and_ignores_zeros():
    x, m, k = torch.tensor([[5, -3, 0]]), torch.tensor([[200, 129, 255]]), torch.tensor([[10, 13, -100]])
    one = aligned(Wide(x, m, k))
    assert torch.equal(one.dequantize(), Wide(x, m, k).dequantize())
    assert torch.equal(aligned(Wide(x, m, torch.tensor([[10, 13, 99]]))).x, one.x)
    assert aligned(Wide(torch.zeros_like(x), m, k)).x.tolist() == [[0, 0, 0]]


def test_limiting_leaves_small_rows_alone():
    wide = Wide(torch.tensor([[2**39, -1], [2**50, -(2**50)]]), torch.tensor([[3], [3]]), torch.tensor([[1], [1]]))
    q = limited(wide)
    assert q.x[0].tolist() == [2**39, -1] and int(q.x.abs().max()) < 2**40
    assert torch.equal(q.dequantize(), wide.dequantize())


def test_bfloat16_scales_are_dyadic_numbers_and_others_are_refused():
    scale = torch.tensor([[0.00123], [3.0], [1e-20]]).bfloat16().float()
    m, k = dyadic_scale(scale, "w")
    assert torch.equal(torch.ldexp(m.double(), -k.double()), scale.double())
    assert int(m.min()) >= 128 and int(m.max()) <= 255
    with pytest.raises(SpecError, match=r'w: scales are no dyadic numbers of 8 bits; store them as bfloat16, which is one: scale = "bfloat16"'):
        dyadic_scale(torch.tensor([[0.1]]), "w")
    with pytest.raises(SpecError, match="exponents beyond 8 bits"):
        dyadic_scale(torch.tensor([[2.0**-125]]) * 2.0**-10, "w")


@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_stored_weight_is_taken_as_it_is(asymmetric):
    q = quantize(normal(9, 32), int_weight(4, asymmetric=asymmetric, scale="bfloat16"))
    assert torch.equal(dyadic_weight(q, "w").dequantize().float(), q.dequantize())


def test_a_constant_saturates_instead_of_overflowing():
    gain = constant(torch.tensor([1.99999, -1.0, 0.25]), 16)
    assert int(gain.x.abs().max()) < 2**15
    torch.testing.assert_close(gain.dequantize(), torch.tensor([1.99999, -1.0, 0.25], dtype=torch.float64), rtol=0, atol=2**-13)


# products --------------------------------------------------------------------------------------------------------------------------------


def test_products_are_within_the_measured_bound_of_output_steps():
    worst: dict[str, list[float]] = {"paper": [], "one-rounding": []}
    for seed in range(500):
        x, w = coded(normal(1, 256, seed=seed)), coded(normal(64, 256, seed=1000 + seed))
        one = Dyadic(w.codes, w.m[:1].expand(64, 1), w.k[:1].expand(64, 1), w.zp, 8)  # the paper's case: one scale for the second operand
        exact = x.dequantize() @ one.dequantize().T
        for form, found in worst.items():
            y = di_matmul(x, one, 8, form)
            found.append(float(((y.dequantize() - exact) / torch.ldexp(y.m.double(), -y.k.double())).abs().max()))
    # half a step of the code, half of the zero point, and up to 0.39 % of the scale: 2 at the very most.  Measured over other draws: 1.29; here: 1.31
    assert max(worst["paper"]) <= 1.35
    assert 0.7 <= sum(worst["paper"]) / 500 <= 0.9  # measured there: 0.80
    assert sum(worst["one-rounding"]) < 0.9 * sum(worst["paper"])


def test_two_roundings_move_a_whole_row():
    q = wide_of(normal(300, 64))
    exact = q.dequantize()

    def bias(form: str) -> float:
        y = requantize(q, 4, form)
        return float(((y.dequantize() - exact) / torch.ldexp(y.m.double(), -y.k.double())).mean(-1).abs().mean())

    assert bias("paper") > 3 * bias("one-rounding")


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_products_with_a_scale_for_each_channel(bits):
    x, w = coded(normal(5, 300), bits), coded(normal(7, 300, seed=1) * torch.logspace(-3, 1, 7).unsqueeze(1).double(), bits)
    exact = x.dequantize() @ w.dequantize().T
    wide = aligned(product(x, w))
    # 40 bits of the row's largest
    assert float((wide.dequantize() - exact).abs().max() / exact.abs().max()) < 2**-38
    y = requantize(wide, 8)
    assert float(((y.dequantize() - exact) / torch.ldexp(y.m.double(), -y.k.double())).abs().max()) <= 1.5


def test_products_do_not_overflow_at_their_extremes():
    k = 40000  # 255·255·K is beyond INT32
    x = Dyadic(torch.full((1, k), 255), scalar(255)[None], scalar(0)[None], scalar(0)[None], 8)
    assert int(product(x, x).x) == 255 * 255 * k
    inside = Dyadic(torch.full((1, 32000), 255), scalar(255)[None], scalar(0)[None], scalar(0)[None], 8)
    assert int(product(inside, inside).x) == 255 * 255 * 32000


def test_a_sum_over_tokens_of_different_scales():
    p = di_clipped_softmax(wide_of(normal(3, 6)), p_out=15)
    v = coded(normal(6, 8) * torch.logspace(-2, 2, 6).unsqueeze(1).double())
    exact = p.dequantize() @ v.dequantize()
    assert float((mix(p, v).dequantize() - exact).abs().max() / exact.abs().max()) < 2**-24


# exponential -----------------------------------------------------------------------------------------------------------------------------


def exponentials(mode: str, m: int, k: int, codes: int = 256) -> tuple[Tensor, Tensor]:
    x = -torch.arange(codes)
    e, unit = di_exp(x, scalar(m), scalar(k), mode)
    return e.double() / unit.double(), torch.exp(x.double() * m / 2**k)


def test_exp_in_sixteen_bits_is_within_the_golden_bounds():
    found, exact = exponentials("q16", 15, 8)
    assert float((found - exact).abs().max()) < 0.05
    assert float(((found - exact).abs() / exact)[exact > 1e-3].max()) < 0.0665  # 6.6 %


def test_the_papers_exp_has_twelve_levels_for_inputs_clipped_at_fifteen():
    _, unit = di_exp(scalar(0), scalar(15), scalar(8), "paper")
    found, exact = exponentials("paper", 15, 8)
    assert int(unit) == 12
    assert bool((found[exact < 0.04] == 0).all())
    assert 0.05 < float((found - exact).abs().max()) < 0.08  # specification: 0.07


@pytest.mark.parametrize("mode", ["paper", "q16"])
@pytest.mark.parametrize(("m", "k"), [(1, 0), (255, -8), (128, 127), (255, 40), (1, 62)])
def test_exp_is_monotonous_and_one_at_zero_for_every_scale(mode, m, k):
    e, unit = di_exp(-torch.arange(2**16), scalar(m), scalar(k), mode)
    assert int(e[0]) == int(unit)
    assert bool((e[1:] <= e[:-1]).all()) and int(e.min()) >= 0


@pytest.mark.parametrize(("m", "k"), [(1, 10), (200, 20), (255, 30), (129, 36)])
def test_exp_in_sixteen_bits_keeps_its_error_over_scales(m, k):
    x = -(torch.linspace(0, 12, 300) * 2**k / m).long()
    e, unit = di_exp(x, scalar(m), scalar(k))
    exact = torch.exp(x.double() * m / 2**k)
    assert float((e / unit - exact).abs().max()) < 0.05


# softmax ---------------------------------------------------------------------------------------------------------------------------------


def l1_to_exact(p: Dyadic, x: Tensor) -> float:
    return float((p.dequantize() - x.softmax(-1)).abs().sum(-1).mean())


def spiked(rows: int = 200) -> Tensor:
    x = 2 * normal(rows, 64)
    x[:, 13] = -200
    return x


@pytest.mark.parametrize(("c", "expected"), [(5, 0.084), (10, 0.020), (15, 0.023), (20, 0.024), (50, 0.042), (2**40, 0.147)])
def test_clipping_keeps_a_score_of_minus_200_from_eating_the_range(c, expected):
    error = l1_to_exact(di_clipped_softmax(wide_of(spiked()), clip=(c, 0), p_out=15), spiked())
    assert error == pytest.approx(expected, rel=0.25)  # the specification's figures, over other random rows


def test_softmax_is_within_the_golden_bounds():
    x = 3 * normal(50, 16)
    p = di_clipped_softmax(wide_of(x))
    assert float((p.dequantize() - x.softmax(-1)).abs().max()) < 0.04
    assert bool(((p.codes.sum(-1) - 128).abs() <= 32).all())


def test_eight_bit_probabilities_are_what_long_rows_lose():
    x = 2 * normal(20, 1024)
    assert l1_to_exact(di_clipped_softmax(wide_of(x), p_out=8), x) > 4 * l1_to_exact(di_clipped_softmax(wide_of(x), p_out=15), x)


def test_masked_scores_have_no_influence_and_a_row_without_any_is_zero():
    x = wide_of(normal(4, 10))
    valid = torch.ones(4, 10, dtype=torch.bool)
    valid[0, 3:], valid[1, ::2], valid[3] = False, False, False
    garbage = Wide(torch.where(valid, x.x, 2**60), x.m, x.k)
    p, same = di_clipped_softmax(x, valid, p_out=15), di_clipped_softmax(garbage, valid, p_out=15)
    assert torch.equal(p.codes, same.codes)
    assert int(p.codes[~valid].abs().sum()) == 0 and int(p.codes[3].sum()) == 0
    short = di_clipped_softmax(Wide(x.x[:1, :3], x.m[:1], x.k[:1]), p_out=15)
    assert torch.equal(p.codes[:1, :3], short.codes)


def test_equal_scores_share_alike():
    p = di_clipped_softmax(wide_of(torch.full((1, 4), 3.7)), p_out=8)
    assert p.codes.tolist() == [[32, 32, 32, 32]]


# SwiGLU ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reach", "paper"), [(2, 0.135), (6, 0.960), (8, 0.996)])
def test_one_maximum_for_both_exponentials_gives_a_wrong_sigmoid(reach, paper):
    """With the row's maximum as the paper shares it, σ(0) of a row that reaches 8 comes out as anything; by |x| it never does."""
    x = torch.linspace(-reach, reach, 255).double().unsqueeze(0)
    q = coded(x)
    exact = torch.sigmoid(q.dequantize())

    def error(form: str) -> float:
        return float((sigmoid(q.wide(), mode=mode, form=form) / 2**15 - exact).abs().max())

    mode = "paper"
    assert error("shared-maximum") == pytest.approx(paper, abs=0.05)  # the specification's measurement
    mode = "q16"
    assert error("stable") < 0.0155  # specification: 0.0145


def test_swiglu_is_within_two_percent_of_its_maximum():
    gate, up = coded(3 * normal(20, 96)), coded(normal(20, 96, seed=1))
    g, u = gate.dequantize(), up.dequantize()
    exact = g * torch.sigmoid(g) * u
    error = (di_swiglu(gate, up).dequantize() - exact).abs()
    assert bool((error.amax(-1) < 0.02 * exact.abs().amax(-1)).all())


def test_swiglu_takes_the_smoothing_back_inside_the_sigmoid():
    s = torch.logspace(-1, 1, 96).double()
    gate, up = coded(3 * normal(20, 96) * s, 12), coded(normal(20, 96, seed=1) / s, 12)
    g, u = gate.dequantize(), up.dequantize()
    exact = g * torch.sigmoid(g / s) * u
    error = (di_swiglu(gate, up, constant(1 / s, 16)).dequantize() - exact).abs()
    assert bool((error.amax(-1) < 0.02 * exact.abs().amax(-1)).all())


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6])
def test_swiglu_of_tiny_and_huge_rows(size):
    gate, up = coded(size * normal(3, 32)), coded(normal(3, 32, seed=1))
    g, u = gate.dequantize(), up.dequantize()
    exact = g * torch.sigmoid(g) * u
    assert float((di_swiglu(gate, up).dequantize() - exact).abs().max() / exact.abs().max()) < 0.02


# norms -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
def test_norm_is_within_the_golden_bound(center):
    x = normal(30, 256) + (5 if center else 0)
    centred = x - x.mean(-1, keepdim=True) if center else x
    exact = centred / centred.square().mean(-1, keepdim=True).sqrt()
    assert float((di_norm(wide_of(x, 24), center=center).dequantize() - exact).abs().max()) < 1e-3


def test_norm_with_gain_and_bias():
    x, gain, bias = normal(30, 64), normal(64, seed=1), normal(64, seed=2)
    exact = torch.nn.functional.layer_norm(x, (64,), gain, bias, eps=0)
    found = di_norm(wide_of(x, 24), constant(gain, 16), constant(bias, 16), center=True).dequantize()
    assert float((found - exact).abs().max()) < 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 22), st.booleans())
def test_norm_does_not_change_with_the_scale_of_a_row(seed, shift, center):
    x = torch.randint(-(2**30), 2**30, (3, 40), generator=rng(seed)) >> int(seed % 29)
    one, k = torch.ones(3, 1).long(), torch.zeros(3, 1).long()
    assert torch.equal(di_norm(Wide(x, one, k), center=center).x, di_norm(Wide(x << shift, one, k), center=center).x)


def test_norm_of_zeros_is_zero_and_of_one_spike_is_the_root_of_its_size():
    rows = torch.zeros(2, 64).long()
    rows[1, 5] = -3
    y = di_norm(Wide(rows, torch.ones(2, 1).long(), torch.zeros(2, 1).long())).dequantize()
    assert float(y[0].abs().max()) == 0 and float(y[1, 5]) == pytest.approx(-8, abs=1e-3)


def test_epsilon_matters_to_rows_of_its_own_size():
    x = 1e-3 * normal(8, 64)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    m, k = (int(t) for t in dyadic_scale(torch.tensor([1e-6]).bfloat16(), "eps"))
    assert float((di_norm(wide_of(x, 24), eps=(m, k)).dequantize() - exact).abs().max()) < 0.01
    assert float((di_norm(wide_of(x, 24)).dequantize() - exact).abs().max()) > 0.1


# the rest --------------------------------------------------------------------------------------------------------------------------------


def test_addition_at_the_coarser_step():
    a, b = coded(normal(5, 20), 16).wide(), coded(100 * normal(5, 20, seed=1), 8).wide()
    found, exact = add(a, b), a.dequantize() + b.dequantize()
    assert bool((found.k == torch.minimum(a.k, b.k)).all())
    assert float((found.dequantize() - exact).abs().max()) <= float(torch.ldexp(torch.ones(5, 1).double(), -found.k.double()).max()) / 2


def test_a_thousand_additions_stay_in_int32():
    total = coded(normal(4, 32), 16).wide()
    for seed in range(100):
        total = add(total, coded(normal(4, 32, seed=seed) * 10 ** ((seed % 7) - 3), 16).wide())
    assert int(total.x.abs().max()) < 2**31


def test_rotation_of_halves_is_within_its_table():
    x, angle = normal(40, 32), normal(40, 16, seed=1)
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    exact = x * cos + torch.cat([-x[:, 16:], x[:, :16]], -1) * sin
    table_cos, table_sin = ((t * 2**14).round().long() for t in (cos, sin))
    found = rotate(wide_of(x, 16), table_cos, table_sin).dequantize()
    assert float((found - exact).abs().max() / exact.abs().max()) < 2**-13


def test_argmax_takes_the_first_of_equals():
    assert argmax(torch.tensor([[1, 5, 5, 5], [2, 2, 2, 2], [-9, -3, -4, -3]])).tolist() == [1, 0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_a_row_does_not_depend_on_its_neighbours(seed):
    x, w, v = normal(6, 48, seed=seed), coded(normal(24, 48, seed=9)), coded(normal(24, 8, seed=7))

    def chain(rows: Tensor) -> Tensor:
        scores = aligned(product(requantize(di_norm(wide_of(rows, 24)), 8), w), 30)
        mixed = mix(di_clipped_softmax(scores, p_out=15), v)
        q = requantize(mixed, 8)
        return requantize(di_swiglu(q, q), 8).codes

    together = chain(x)
    assert torch.equal(together, torch.cat([chain(row.unsqueeze(0)) for row in x]))
    assert torch.equal(together.flip(0), chain(x.flip(0)))
