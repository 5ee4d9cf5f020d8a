"""The laws of ZeroQuant-FP (https://arxiv.org/abs/2307.09782): what power-of-two scales cost, what they buy, and why inputs are FP8."""

import torch
from qcore.evaluation.metrics import sqnr_db
from qcore.numbers import QuantSpec, fake_quantize, fp8_activation, int_activation, mx
from qcore.numbers.formats import FP4_E2M1, FP8_E4M3
from qcore.numbers.granularity import PerGroup
from qcore.plugins.registry import Registry
from qcore.recipe_file import load_recipe
from qcore.solvers import GPTQ, RTN

M1 = mx(FP4_E2M1, rule="ceil", group=128)
FREE = QuantSpec(format=FP4_E2M1, granularity=PerGroup(128), scale="float32")


def db(x: torch.Tensor, spec: QuantSpec, rows: slice = slice(None)) -> float:
    error = (fake_quantize(x, spec) - x)[:, rows]
    return sqnr_db(float(x[:, rows].double().square().sum()), float(error.double().square().sum()))


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_fp4_value_times_a_power_of_two_is_an_fp8_value() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = FP4_E2M1.decode(codes)
    for n in range(-8, 7):
        scaled = values * 2.0**n
        assert torch.equal(FP8_E4M3.decode(FP8_E4M3.encode(scaled)), scaled), n
    assert not torch.equal(FP8_E4M3.decode(FP8_E4M3.encode(values * 2.0**-9)), values * 2.0**-9)  # 0.5·2^-9 is below the least subnormal


def test_powers_of_two_cost_what_the_specification_says() -> None:
    # searched clipping would hide it: scales are those of the largest magnitude.  Specification: free 19.25 dB, M1 18.00 dB
    w = gauss(256, 1024)
    free, m1 = (db(w, spec) for spec in (FREE, M1))
    assert abs(free - 19.25) < 0.15 and abs(m1 - 18.00) < 0.25 and free > m1


def test_rounded_up_scales_never_clip() -> None:
    w = gauss(64, 256) * torch.logspace(-3, 3, 64).unsqueeze(1)
    largest = w.unflatten(1, (-1, 128)).abs().amax(-1)
    q = RTN(clip="none").solve(w, M1, {})
    codes = q.parts["scale.codes"].int()  # E8M0: the exponent plus 127
    scales = torch.ldexp(torch.ones(codes.shape, dtype=torch.float64), codes - 127)
    assert (scales * 6 >= largest).all() and (scales * 3 <= largest * (1 + 1e-6)).all()  # E2M1 reaches 6; the next smaller power would clip


def test_inputs_with_outliers_keep_more_in_fp8_than_in_int8() -> None:
    # Specification: 60-fold outliers in a few channels, per token: FP8 31.5 dB and INT8 14.1 dB in the other channels
    x = gauss(512, 1024)
    x[:, :4] *= 60
    inliers = slice(4, None)
    fp8, int8 = db(x, fp8_activation(), inliers), db(x, int_activation(8), inliers)
    assert fp8 > 30 and int8 < 17 and fp8 > int8 + 14


def test_the_recipe_is_that_of_the_paper() -> None:
    recipe = load_recipe("zeroquant-fp-w4a8", Registry(""), ())
    assert isinstance(recipe.solver, GPTQ)
    weight, activation = (rule.spec for rule in recipe.rules)
    assert weight == mx(FP4_E2M1, rule="ceil", group=64) and activation == fp8_activation()


def test_gptq_beats_nearest_on_this_grid_too() -> None:
    g = gauss(256, 128, seed=3) @ (torch.eye(128) + 0.3 * gauss(128, 128, seed=4))  # correlated inputs
    gram = (g.T @ g).double()
    w = gauss(64, 128, seed=5)
    spec = mx(FP4_E2M1, rule="ceil", group=64)

    def loss(values: torch.Tensor) -> float:
        d = (values - w).double()
        return float(((d @ gram) * d).sum())

    nearest = RTN(clip="none").solve(w, spec, {}).dequantize()
    assert loss(GPTQ().solve(w, spec, {"gram": gram.float()}).dequantize()) < 0.8 * loss(nearest)
