"""The non-linear unit: what its tables hold, how far a look-up may be off, and what it costs on chip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qcore.numbers import quantize
from qplug_hardware.block_float import BBFP, BFP
from qplug_hardware.integer_dot import fields
from qplug_hardware.tables import FUNCTIONS, ExponentTable, UniformTable, _tables, block_spec, encoded, gelu, silu, softmax
from torch import Tensor

SLOPES = {"sigmoid": 0.25, "normal-cdf": 0.4, "exp": 1.0}  # the steepest of each function


def values(rows: int = 64, columns: int = 256, seed: int = 0) -> Tensor:
    """Blocks of 32 whose largest lie between 2^-4 and 2^4."""
    g = torch.Generator().manual_seed(seed)
    size = 2.0 ** torch.randint(-4, 4, (rows, -(-columns // 32)), generator=g)
    return torch.randn(rows, columns, generator=g) * size.repeat_interleave(32, 1)[:, :columns]


def arguments(function: str, x: Tensor) -> Tensor:
    return {"negative": -x.abs(), "positive": x.abs().clamp(min=0.05), "any": x}[FUNCTIONS[function].domain]


def bins(x: Tensor, table: ExponentTable) -> Tensor:
    """The width of what one entry stands for, at each value."""
    q = quantize(x, block_spec(table.element))
    scale = q.scale().repeat_interleave(32, 1)[:, : x.shape[1]]
    _, flag, _ = fields(q.codes, table.element)
    return torch.where(flag == 1, scale * 2.0 ** getattr(table.element, "shift", 0), scale) * 2.0 ** (1 - table.index)


@pytest.mark.parametrize("half", ["sign", "window"])
@pytest.mark.parametrize("function", ["sigmoid", "normal-cdf", "exp"])
def test_an_entry_is_the_function_at_the_middle_of_what_it_stands_for(function, half):
    table = ExponentTable(function, half=half, index=7)
    entries, points = _tables(table)
    assert entries.shape == (32, 2, 128) and int(entries.min()) >= 0 and int(entries.max()) < 1 << 16
    f = FUNCTIONS[function]
    for e in (-15, -3, 0, 4, 11):
        for h in range(2):
            negative = h == 1 if half == "sign" else f.domain == "negative"
            if f.domain == "negative" and not negative:
                continue
            own = e + (5 * h if half == "window" else 0)
            for j in (0, 1, 77, 127):
                x = (j + 0.5) * 2.0 ** (own - 6) * (-1 if negative else 1)
                point = int(points[e + 15, h])
                got = int(entries[e + 15, h, j]) * 2.0**-point
                assert abs(got - float(f.of(torch.tensor(x, dtype=torch.float64)))) <= 2.0 ** -(point + 1)


@pytest.mark.parametrize("element", [BBFP(10, 5), BBFP(8, 4), BFP(10)], ids=str)
@pytest.mark.parametrize("half", ["sign", "window"])
@pytest.mark.parametrize("index", [6, 7, 8])
@pytest.mark.parametrize("function", list(SLOPES))
def test_a_look_up_is_off_by_half_an_entry_and_its_rounding(function, index, half, element):
    table = ExponentTable(function, element, index, half)
    x = arguments(function, values())
    wanted = FUNCTIONS[function].of(encoded(x, element).double())
    bound = SLOPES[function] * bins(x, table) / 2 + 2.0 ** -(table.width - 1)
    assert bool(((table(x) - wanted).abs() <= bound).all())


@pytest.mark.parametrize("function", list(SLOPES))
def test_with_all_bits_of_the_mantissa_only_rounding_is_left(function):
    table = ExponentTable(function, index=10)
    x = arguments(function, values())
    assert float((table(x) - FUNCTIONS[function].of(encoded(x, table.element).double())).abs().max()) <= 2.0**-15


@pytest.mark.parametrize("index", [7, 8])
def test_a_reciprocal_is_off_by_a_part_in_two_to_the_t(index):
    x = values().abs() + 2.0**-6
    hat = encoded(x, BBFP(10, 5)).double()
    seen = hat > 0
    off = ((ExponentTable("reciprocal", index=index)(x) * hat - 1).abs())[seen]
    assert float(off.max()) <= 2.0**-index * 1.01 + 2.0**-14


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(SLOPES)), st.integers(0, 1000))
def test_both_readings_of_the_halves_give_the_same_function(function, seed):
    x = arguments(function, values(4, 64, seed))
    one, other = (ExponentTable(function, half=h)(x) for h in ("sign", "window"))
    assert float((one - other).abs().max()) <= 2.0**-15


def test_look_ups_are_monotone_within_a_block():
    x = torch.linspace(-20, 20, 32).unsqueeze(0)
    for function, half in [("sigmoid", "sign"), ("sigmoid", "window"), ("normal-cdf", "window")]:
        assert bool((ExponentTable(function, half=half)(x).diff() >= -(2.0**-15)).all())


def test_bytes_are_exponents_times_two_times_entries_times_width():
    table = ExponentTable("sigmoid", index=7, width=16)
    assert table.total_bytes == 32 * 2 * 128 * 2
    one, two = torch.full((1, 32), 0.5), torch.full((1, 32), 0.5)
    two[0, 3] = 100.0  # e_max = 6: e_s = 1, so that 0.5 is not flagged and 100 is, under the exponents 1 and 6
    assert table.bytes_on_chip(one) == 1 * 2 * 128 * 2
    assert table.bytes_on_chip(two) == 2 * 2 * 128 * 2
    assert table.bytes_on_chip(torch.cat([one, two])) == 2 * 2 * 128 * 2
    assert ExponentTable("sigmoid", index=7, half="window").bytes_on_chip(two) == 1 * 2 * 128 * 2
    assert ExponentTable("sigmoid", BFP(10), index=7).bytes_on_chip(two) == 1 * 2 * 128 * 2
    # what a BBFP block can need at most, whatever is in it
    assert table.bytes_on_chip(values()) <= 2 * 2 * 128 * 2


@pytest.mark.parametrize("function", ["sigmoid", "normal-cdf", "exp"])
def test_a_uniform_table_of_the_size_on_chip_is_three_times_as_far_off_on_average(function):
    """Not in the worst case: an even grid is finer than these tables among a block's flagged values."""
    x = arguments(function, values())
    wanted = FUNCTIONS[function].of(x.double())
    for half in ("sign", "window"):
        table = ExponentTable(function, half=half)
        even = UniformTable(function, float(x.min()), float(x.max()), table.bytes_on_chip(x) // 2)
        ours, theirs = ((t(x) - wanted).abs().mean() for t in (table, even))
        assert ours * 3 < theirs, (half, ours, theirs)


@pytest.mark.parametrize("half", ["sign", "window"])
def test_a_softmax_sums_to_one_and_masks_are_zero(half):
    x = values(16, 100)
    x[:, 60:] = -torch.inf
    p = softmax(x, ExponentTable("exp", half=half))
    assert not p[:, 60:].any()
    assert float((p.sum(-1) - 1).abs().max()) < 2.0**-7  # the reciprocal is off by a part in 2^8, the output by roundings
    assert float((p - x.double().softmax(-1)).abs().max()) < 0.02


def test_a_softmax_does_not_see_what_is_added_to_a_row():
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-64, 64, (8, 96), generator=g) / 8
    assert torch.equal(softmax(x), softmax(x + 100.0))


def test_a_row_of_equal_values_is_shared_out_evenly():
    p = softmax(torch.zeros(2, 64))
    assert bool((p == p[0, 0]).all()) and float(p[0, 0]) == pytest.approx(1 / 64, rel=2.0**-7)


def test_a_far_mask_does_not_widen_the_blocks_of_the_others():
    x = values(8, 64)
    masked = x.clone()
    masked[:, 40:] = torch.finfo(torch.float32).min
    assert torch.equal(softmax(masked)[:, :40], softmax(torch.where(masked < -1e30, -torch.inf, masked))[:, :40])


@pytest.mark.parametrize(("ours", "exact"), [(silu, torch.nn.functional.silu), (gelu, torch.nn.functional.gelu)])
def test_gates_are_close_and_bbfp_is_closer_than_bfp(ours, exact):
    x = values()
    wanted = exact(x.double())
    function = "sigmoid" if ours is silu else "normal-cdf"
    errors = {}
    for element in (BBFP(10, 5), BFP(10)):
        errors[element.name] = float((ours(x, ExponentTable(function, element, 8)) - wanted).square().sum() / wanted.square().sum())
    assert errors["bbfp"] < 1e-5 and errors["bbfp"] <= errors["bfp"], errors


def test_blocks_at_the_end_of_a_row_may_be_shorter():
    x = values(3, 45)
    assert silu(x).shape == gelu(x).shape == softmax(x).shape == (3, 45)
    assert torch.equal(silu(torch.cat([x, torch.zeros(3, 19)], 1))[:, :45], silu(x))
    assert torch.equal(silu(x.reshape(3, 1, 45)), silu(x).reshape(3, 1, 45))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ExponentTable("tanh"), "have: exp, reciprocal, sigmoid, normal-cdf"),
        (lambda: ExponentTable("exp", index=11), "1 to m=10"),
        (lambda: ExponentTable("exp", half="both"), "sign, window"),
        (lambda: ExponentTable("exp", width=40), "2 to 24"),
        (lambda: ExponentTable("exp")(torch.ones(1, 32)), "for negative numbers, got 1"),
        (lambda: ExponentTable("reciprocal")(torch.zeros(1, 32)), "for positive numbers, got 0"),
        (lambda: ExponentTable("sigmoid")(torch.full((1, 32), torch.nan)), "NaN or infinite"),
        (lambda: softmax(torch.full((1, 32), -torch.inf)), "nothing but -inf"),
        (lambda: softmax(torch.tensor([[0.0, torch.nan]])), "has NaN"),
        (lambda: softmax(torch.zeros(1, 32), ExponentTable("sigmoid")), "got a table of 'sigmoid'"),
        (lambda: UniformTable("exp", 1.0, 0.0, 8), "a finite range"),
    ],
)
def test_what_no_table_can_do_is_refused(call, words):
    with pytest.raises(SpecError, match=words):
        call()
