"""Two tables: the errors that were measured for them, their exactness at corners, their tails, and the way through a checkpoint."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.testing import check_module
from qplug_perception.petr.dulut import FUNCTIONS, Tables, _linear, build, fraction_bits, uniform
from qplug_perception.petr.lookup import TableLookup

# function, range, largest and root mean square error of 32 + 32 entries; largest of one table of 32, 64 and 256
TABLE = [
    ("silu", -8.0, 8.0, 2.8e-3, 1.4e-3, 1.7e-2, 4.0e-3, 2.5e-4),
    ("gelu", -8.0, 8.0, 2.3e-3, 7e-4, 2.6e-2, 6.4e-3, 3.9e-4),
    ("exp", -20.0, 0.0, 8.3e-4, 3.9e-4, 3.8e-2, 1.1e-2, 7.4e-4),
]


@pytest.mark.parametrize(("function", "low", "high", "largest", "rms", "lin32", "lin64", "lin256"), TABLE)
def test_errors_are_those_that_an_independent_program_measured(function, low, high, largest, rms, lin32, lin64, lin256):
    x = torch.linspace(low, high, 100_001, dtype=torch.float64)
    off = (build(function, low, high)(x) - FUNCTIONS[function].of(x)).abs()
    assert off.max().item() == pytest.approx(largest, rel=0.2)
    assert off.square().mean().sqrt().item() == pytest.approx(rms, rel=0.2)
    for entries, wanted in ((32, lin32), (64, lin64), (256, lin256)):
        one = _linear(uniform(function, low, high, entries), (x - low) * ((entries - 1) / (high - low)))
        assert (one - FUNCTIONS[function].of(x)).abs().max().item() == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
@pytest.mark.parametrize("entries", [(32, 32), (16, 32), (32, 16), (8, 64), (3, 2)])
def test_no_table_is_worse_than_what_it_said(function, entries):
    low, high = (-20.0, 0.0) if function == "exp" else (-8.0, 8.0)
    tables = build(function, low, high, *entries)
    x = torch.linspace(low, high, 40_001, dtype=torch.float64)
    assert (tables(x) - FUNCTIONS[function].of(x)).abs().max().item() <= tables.error * 1.01 + 1e-12
    assert (len(tables.first), len(tables.second)) == entries
    assert (tables.first.diff() > 0).all() and tables.first[0] == 0


def test_more_entries_are_never_worse():
    errors = [build("silu", -8.0, 8.0, n, n).error for n in (8, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 20


def test_the_cascade_is_exact_at_its_corners():
    tables = build("gelu", -8.0, 8.0)
    x = torch.linspace(-8, 8, 32, dtype=torch.float64)  # cells of T1
    whole = tables.first == tables.first.round()
    torch.testing.assert_close(tables(x)[whole], FUNCTIONS["gelu"].of(x)[whole], rtol=0, atol=1e-12)


def test_a_falling_first_table_is_refused():
    with pytest.raises(SpecError, match="does not rise"):
        Tables("exp", -1.0, 0.0, torch.tensor([0.0, 2.0, 1.0]), torch.ones(4), 0.0)


def test_beyond_the_range_stand_the_tails():
    silu, exp, sigmoid = (TableLookup.of(build(f, -8.0, 0.0 if f == "exp" else 8.0)) for f in ("silu", "exp", "sigmoid"))
    far = torch.tensor([-torch.inf, -1e30, -9.0, 9.0, 1e30, torch.inf, torch.nan])
    torch.testing.assert_close(silu(far), torch.tensor([0.0, 0.0, 0.0, 9.0, 1e30, torch.inf, torch.nan]), equal_nan=True)
    ends = torch.tensor([-8.0, 0.0]).exp()
    assert torch.allclose(exp(far)[:3], ends[:1]) and torch.allclose(exp(far)[3:6], ends[1:])
    assert (sigmoid(far)[:6] >= 0).all() and (sigmoid(far)[:6] <= 1).all() and sigmoid(far)[6].isnan()


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_fixed_point_costs_less_than_the_tables_do(function):
    low, high = (-20.0, 0.0) if function == "exp" else (-8.0, 8.0)
    tables = build(function, low, high)
    x = torch.linspace(low, high, 40_001)
    apart = (TableLookup.of(tables)(x) - tables(x.double()).float()).abs().max().item()
    assert apart < 0.3 * tables.error


def test_eight_bit_codes_are_those_of_floats():
    """97 to 98 % were measured; the rest is one step away."""
    for function, low, high in (("silu", -8.0, 8.0), ("gelu", -8.0, 8.0), ("exp", -20.0, 0.0)):
        x = torch.linspace(low, high, 100_001)
        y, wanted = TableLookup.of(build(function, low, high))(x), FUNCTIONS[function].of(x)
        step = (wanted.max() - wanted.min()).item() / 255
        one, other = (y / step).round(), (wanted / step).round()
        assert (one == other).float().mean().item() > 0.95
        assert (one - other).abs().max().item() <= 1


def test_too_few_fraction_bits_are_refused():
    tables = build("silu", -8.0, 8.0)
    assert fraction_bits(32) == 13 and fraction_bits(33) == 14
    with pytest.raises(SpecError, match="fraction=12"):
        TableLookup.of(tables, fraction=12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_module_survives_a_checkpoint(dtype):
    check_module(TableLookup.of(build("gelu", -8.0, 8.0, 16, 32)), torch.linspace(-10, 10, 999, dtype=dtype))
