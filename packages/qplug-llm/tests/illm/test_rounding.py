"""The rounding helpers against Python's integers, which have no last bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qplug_llm.illm.rounding import INT64_MAX, divide_floor, divide_half_away, isqrt, log2_floor, msb, shift_floor, shift_right

ends = st.sampled_from([0, 1, 2, 3, INT64_MAX, INT64_MAX - 1, 2**62, 2**62 - 1, 2**62 + 1, 2**32, 2**32 - 1, 2**53 + 1])
positive = st.one_of(ends, st.integers(0, 63).flatmap(lambda n: st.integers(0, min(2**n, INT64_MAX))))
whole = st.builds(lambda a, negative: -a if negative else a, positive, st.booleans())
divisor = positive.filter(lambda a: a > 0)
few = settings(max_examples=25, deadline=None)


def many(*numbers: st.SearchStrategy) -> st.SearchStrategy:
    """Lists of tuples: one call of the helper for all of them."""
    return st.lists(st.tuples(*numbers), min_size=1, max_size=40)


def columns(rows: list[tuple[int, ...]]) -> list[torch.Tensor]:
    return [torch.tensor(column) for column in zip(*rows, strict=True)]


def half_away(a: int, b: int) -> int:
    q, r = divmod(abs(a), b)
    return (q + (2 * r >= b)) * (-1 if a < 0 else 1)


@few
@given(many(whole, divisor))
def test_division_rounds_halves_away_from_zero(rows):
    assert divide_half_away(*columns(rows)).tolist() == [half_away(a, b) for a, b in rows]


@few
@given(many(whole, divisor, st.sampled_from([1, -1])))
def test_floor_division_goes_down_whatever_the_signs(rows):
    a, b, sign = columns(rows)
    assert divide_floor(a, b * sign).tolist() == [a // (b * sign) for a, b, sign in rows]


@few
@given(many(whole, st.integers(0, 200)))
def test_shift_to_the_right_is_division_by_a_power_of_two(rows):
    assert shift_right(*columns(rows)).tolist() == [half_away(a, 2**n) for a, n in rows]
    assert shift_floor(*columns(rows)).tolist() == [a >> n for a, n in rows]


@few
@given(many(whole.filter(lambda a: abs(a) < 2**40), st.integers(0, 22)))
def test_shift_by_a_negative_number_goes_to_the_left(rows):
    a, n = columns(rows)
    assert shift_right(a, -n).tolist() == [a << n for a, n in rows]


@few
@given(many(positive))
def test_msb_is_the_bit_length_less_one(rows):
    assert msb(*columns(rows)).tolist() == [a.bit_length() - 1 for (a,) in rows]


@few
@given(many(divisor, divisor))
def test_log2_of_a_quotient(rows):
    for (a, b), n in zip(rows, log2_floor(*columns(rows)).tolist(), strict=True):
        assert b << max(n, 0) <= a << max(-n, 0)  # 2^n ≤ a / b
        assert a << max(-n - 1, 0) < b << max(n + 1, 0)  # a / b < 2^(n+1)


def test_isqrt_of_the_first_5000_numbers_and_of_all_ends():
    numbers = [*range(5000), INT64_MAX, INT64_MAX - 1, 2**62, 2**62 - 1, 3037000499**2, 3037000499**2 - 1]
    assert isqrt(torch.tensor(numbers)).tolist() == [math.isqrt(n) for n in numbers]


def test_isqrt_of_5000_large_numbers():
    numbers = torch.randint(0, 2**62, (5000,), generator=torch.Generator().manual_seed(0))
    assert isqrt(numbers).tolist() == [math.isqrt(n) for n in numbers.tolist()]


@few
@given(many(positive))
def test_isqrt_is_the_floor_of_the_root(rows):
    assert isqrt(*columns(rows)).tolist() == [math.isqrt(a) for (a,) in rows]


@pytest.mark.parametrize("a", [INT64_MAX, -INT64_MAX, 2**53 + 1])
def test_nothing_passes_through_a_float(a):
    one = torch.tensor([a])
    assert divide_half_away(one, 1).tolist() == divide_floor(one, 1).tolist() == shift_right(one, 0).tolist() == [a]


def test_operations_broadcast_and_keep_int64():
    a, b = torch.tensor([[7], [-7]]), torch.tensor([2, 3, 4])
    assert divide_half_away(a, b).tolist() == [[4, 2, 2], [-4, -2, -2]]
    assert shift_right(a, torch.tensor([0, 1, 2])).tolist() == [[7, 4, 2], [-7, -4, -2]]
    assert divide_half_away(a, b).dtype is shift_right(a, b).dtype is torch.int64
