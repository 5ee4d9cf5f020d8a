"""The products of one layer: their axes, their numbers, their gradients, and what is kept between forward and backward."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from qcore.numbers import NumberFormat, QuantSpec
from qcore.numbers.formats import NO_PARAMS
from qcore.training import code_rows, counting_saved, integer_product, save_rows
from qplug_llm.gsq.layer import GSQLinear
from qplug_llm.gsq.step import FLOAT, Numbers


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class SixteenBits(NumberFormat):
    """GSE-INT16's elements; qplug-hardware's formats end at 13 bits."""

    name: ClassVar[str] = "sixteen"
    bits: int = 16
    lo = -(2.0 - 2.0**-14)
    hi = 2.0 - 2.0**-14
    code_dtype = torch.int32

    def encode(self, x, params=NO_PARAMS):
        return ((x.float() * 2.0**14).round().clamp(-32767, 32767).int()) & 0xFFFF

    def decode(self, codes, params=NO_PARAMS):
        c = codes.int()
        return torch.where(c >= 32768, (c - 65536).clamp(min=-32767), c).float() * 2.0**-14


def in_sixteen(own: Numbers) -> Numbers:
    def wide(spec: QuantSpec | None) -> QuantSpec:
        assert spec is not None
        return replace(spec, format=SixteenBits())

    return replace(own, activation=wide(own.activation), gradient=wide(own.gradient))


def test_float_numbers_have_the_gradients_of_their_function(make):
    made = make.layer(FLOAT, out=6, into=5, rank=3, alpha=2.0, bias=True).double()
    x = torch.randn(4, 5, dtype=torch.float64, generator=g(0), requires_grad=True)

    def call(x, a, b):
        return torch.func.functional_call(made, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(call, (x, made.lora_A, made.lora_B))
    wanted = x @ (made.leaf.weight + 2 / 3 * made.lora_B @ made.lora_A).T + made.leaf.bias
    assert torch.allclose(call(x, made.lora_A, made.lora_B), wanted, atol=1e-12)


@pytest.mark.parametrize("rows", [32, 45, 3])
def test_sixteen_bits_match_float_and_eight_bits_have_its_direction(make, rows):
    x, dy = torch.randn(rows, 50, generator=g(0)), torch.randn(rows, 40, generator=g(1)) * 1e-6
    exact = make.gradients(make.layer(FLOAT), x, dy)
    for own, least, closest in ((in_sixteen(make.numbers(8, 8)), 1 - 1e-6, 3e-4), (make.numbers(8, 8), 0.999, 0.05)):
        for got, wanted in zip(make.gradients(make.layer(own), x, dy), exact, strict=True):
            cosine = torch.cosine_similarity(got.double().flatten(), wanted.double().flatten(), dim=0)
            assert cosine >= least
            assert (got - wanted).norm() <= closest * wanted.norm()


def test_every_product_is_coded_along_its_own_axis(make):
    """The table of `step`, written out once more with `code_rows` alone."""
    own = make.numbers(6, 5)
    made = make.layer(own)
    x, dy = torch.randn(45, 50, generator=g(0)), torch.randn(45, 40, generator=g(1)) * 2.0**-20
    qa, qg = (lambda t: code_rows(t, own.activation).values()), (lambda t: code_rows(t, own.gradient).values())
    w, a, b, s = made.leaf.weight, made.lora_A.detach(), made.lora_B.detach(), made.scaling
    h = qa(x) @ qa(a).T
    dh = s * (qg(dy) @ qa(b.T).T)
    wanted = (
        qa(x) @ qa(w).T + s * (qa(h) @ qa(b).T),
        qg(dy) @ qa(w.T).T + qg(dh) @ qa(a.T).T,
        qg(dh.T) @ qa(x.T).T,
        s * (qg(dy.T) @ qa(h.T).T),
    )
    for got, should in zip(make.gradients(made, x, dy), wanted, strict=True):
        assert torch.allclose(got, should, rtol=1e-5, atol=1e-6 * float(should.abs().max()))  # float32 sums in another order


def test_products_in_float32_are_the_integer_products_but_for_the_rounding_of_sums(make):
    own = make.numbers(8, 8)
    x, w = torch.randn(20, 768, generator=g(0)), torch.randn(30, 768, generator=g(1))
    p, q = code_rows(x, own.activation), code_rows(w, own.activation)
    exact = integer_product(p, q)
    bound = 768 * 2.0**-24 * (p.values().abs().double() @ q.values().abs().double().T)
    assert bool(((p.values() @ q.values().T - exact).abs() <= bound).all())


def test_a_rank_that_is_no_multiple_of_the_group_is_padded_and_rows_stay_apart(make):
    own = make.numbers(8, 8)
    made = make.layer(own, rank=5, alpha=5.0)
    x = torch.randn(7, 50, generator=g(0))
    x[3] *= 2.0**12
    whole = made(x).detach()
    assert torch.allclose(whole[:3], made(x[:3]).detach(), atol=1e-6)  # a row's own groups decide; sums may be in another order


@pytest.mark.parametrize(("keep", "bits"), [("packed", 6 + 5 / 32), ("bytes", 8 + 8 / 32)])
def test_saved_are_the_codes_of_x_and_h_alone(make, keep, bits):
    own = make.numbers(6, 6, keep=keep)
    made = make.layer(own, out=64, into=96, rank=32)
    x = torch.randn(256, 96, generator=g(0), requires_grad=True)
    with counting_saved(*made.parameters()) as saved:
        made(x)
    assert saved.total == 256 * (96 + 32) * bits / 8 == made.shared.tally.kept


def test_what_is_kept_comes_back_bit_for_bit(make):
    own = make.numbers(6, 6)
    rows = code_rows(torch.randn(13, 100, generator=g(0)), own.activation)
    for keep in ("packed", "bytes"):
        assert torch.equal(save_rows(rows, keep).rows().values(), rows.values())
    tensor = code_rows(torch.randn(13, 100, generator=g(0)) * 1e-9, own.gradient)
    assert torch.equal(save_rows(tensor).rows().values(), tensor.values())


def test_layers_that_read_one_tensor_keep_one_copy(make):
    own = make.numbers(6, 6)
    q = make.layer(own)
    k = GSQLinear(make.linear(24, 50, seed=4), 8, 8.0, own, shared=q.shared)
    x = torch.randn(64, 50, generator=g(0), requires_grad=True)
    with counting_saved(*q.parameters(), *k.parameters()) as both:
        y = q(x).sum() + k(x).sum()
    once = save_rows(code_rows(x.detach().T, own.activation)).nbytes()
    inner = save_rows(code_rows(torch.zeros(8, 64), own.activation)).nbytes()
    assert both.total == once + 2 * inner
    y.backward()
    changed = x.detach()
    before = q(changed)
    with torch.no_grad():
        changed.mul_(2)
    assert not torch.equal(q(changed), before)  # the copy of the old values is not used for the new ones


def test_an_input_is_forgotten_with_its_tensor(make):
    made = make.layer(make.numbers(6, 6))
    with torch.no_grad():
        x = torch.randn(4, 50, generator=g(0))
        made(x)
    assert len(made.shared._known) == 1
    del x
    assert len(made.shared._known) == 0


def test_nothing_is_kept_without_gradients(make):
    made = make.layer(make.numbers(6, 6))
    with torch.no_grad():
        made(torch.randn(4, 50))
    assert made.shared.tally.kept == 0


def test_the_share_of_all_zero_groups_is_counted_and_the_bias_keeps_small_gradients(make):
    auto = make.numbers(6, 6)
    fixed = replace(auto, gradient=auto.activation)
    x, dy = torch.randn(64, 50, generator=g(0)), torch.randn(64, 40, generator=g(1)) * 2.0**-30
    for own, share in ((auto, 0.0), (fixed, 1.0)):
        made = make.layer(own)
        make.gradients(made, x, dy)
        assert set(made.shared.tally.fractions().values()) == {share}
        assert len(made.shared.tally.fractions()) == 4


def test_stochastic_gradients_follow_the_seed_and_leave_the_forward_pass_alone(make):
    own = make.numbers(5, 5, rounding="stochastic")
    x, dy = torch.randn(64, 50, generator=g(0)), torch.randn(64, 40, generator=g(1))

    def run(step):
        made = make.layer(own)
        made.dither.begin(step, 0)
        return make.gradients(made, x, dy)

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    assert torch.equal(first[0], other[0]) and not torch.equal(first[2], other[2])
    exact = make.gradients(make.layer(make.numbers(5, None)), x, dy)
    mean = sum(run(i)[3] for i in range(40)) / 40  # dB reads gradients once: its mean is exact
    assert (mean - exact[3]).norm() < 0.25 * (first[3] - exact[3]).norm()  # 1 / sqrt(40) = 0.16


def test_truncation_is_worse_than_rounding(make):
    x = torch.randn(64, 96, generator=g(0))
    own = make.numbers(6, 6)
    cut = replace(own.activation, format=replace(own.activation.format, rounding="truncate"))
    error = [float((code_rows(x, spec).values() - x).square().mean()) for spec in (own.activation, cut)]
    assert 3 < error[1] / error[0] < 5


def trained(make, steps):
    """The toy of the specification: rank-4 target, 256 → 128, NF4 weight, rank 32, steps of Adam.

    Relative squared error on held-out inputs: of the weight alone, and after tuning in float and in A8G8, A6G6, A5G5.
    """
    from qcore.numbers.tensor import fake_quantize
    from qcore.training import TrainSettings, train

    generator = g(7)
    weight = torch.randn(128, 256, generator=generator) / 16
    target = weight + torch.randn(128, 4, generator=generator) @ torch.randn(4, 256, generator=generator) / 60
    leaf = torch.nn.Linear(256, 128, bias=False).requires_grad_(False)
    leaf.weight.copy_(fake_quantize(weight, make.recipe("gsq-w4a8g8").rules[0].spec))
    x, held = torch.randn(2048, 256, generator=generator), torch.randn(512, 256, generator=generator)
    wanted, truth = x @ target.T, held @ target.T

    def relative(call):
        with torch.no_grad():
            return float((call(held) - truth).square().mean() / truth.square().mean())

    def tuned(own):
        made = GSQLinear(leaf, 32, 32.0, own, hold=True)
        settings = TrainSettings(steps=steps, batch=128, rate=3e-3, clip=None)
        train({"A": made.lora_A, "B": made.lora_B}, lambda i: (made(x[i]) - wanted[i]).square().mean(), len(x), settings)
        return relative(made)

    return relative(leaf), *(tuned(own) for own in (FLOAT, *(make.numbers(b, b) for b in (8, 6, 5))))


@pytest.mark.slow
def test_four_hundred_steps_in_few_bits_come_close_to_float(make):
    nothing, exact, eight, six, five = trained(make, 400)
    assert exact < eight < six < five
    assert eight <= 1.15 * exact and six <= 1.6 * exact and five < 0.05 * nothing


def test_sixty_steps_in_few_bits_come_close_to_float(make):
    nothing, exact, eight, six, five = trained(make, 60)
    assert eight < six < five  # of float and eight bits either may be ahead before both have converged
    assert abs(eight - exact) <= 0.15 * exact and six <= 1.6 * exact and five < 0.5 * nothing
