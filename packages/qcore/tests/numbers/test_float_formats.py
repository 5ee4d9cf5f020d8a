"""Minifloats against torch's own casts, the OCP tables, and compressed-tensors."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, FP8_E5M2, Float

TORCH_CASTS = [(FP8_E4M3, torch.float8_e4m3fn), (FP8_E5M2, torch.float8_e5m2)]
MINIFLOATS = [FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, FP8_E5M2]


@pytest.mark.parametrize("fmt", [*MINIFLOATS, Float(5, 0), Float(1, 2), Float(7, 0)], ids=str)
def test_zero_stays_zero_with_its_sign(fmt):
    codes = fmt.encode(torch.tensor([0.0, -0.0]))
    assert codes.tolist() == [0, 1 << (fmt.bits - 1)]
    assert fmt.decode(codes).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("fmt", "dtype"), TORCH_CASTS, ids=str)
def test_every_fp8_pattern_means_what_torch_says(fmt, dtype):
    patterns = torch.arange(256, dtype=torch.uint8)
    theirs = patterns.view(dtype).float()
    number = theirs.isfinite()
    assert torch.equal(fmt.decode(patterns)[number], theirs[number])
    assert torch.equal(fmt.encode(theirs[number]), patterns[number])


@pytest.mark.parametrize(("fmt", "dtype"), TORCH_CASTS, ids=str)
def test_fp8_rounds_bit_by_bit_as_torch_does(fmt, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator) * torch.exp2(torch.randint(-24, 15, (20_000,), generator=generator).float())
    table = fmt.decode(torch.arange(256, dtype=torch.uint8))
    table = table[table.isfinite()].sort().values
    ties = (table[1:] + table[:-1]) / 2
    x = torch.cat([x, ties, torch.nextafter(ties, torch.tensor(1e9)), torch.nextafter(ties, torch.tensor(-1e9))])
    x = x[x.abs() <= fmt.hi]  # beyond, torch makes E5M2 infinite; these formats saturate
    assert torch.equal(fmt.encode(x), x.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("fmt", MINIFLOATS, ids=str)
def test_minifloats_saturate(fmt):
    assert fmt.decode(fmt.encode(torch.tensor([fmt.hi * 1.5, -1e30]))).tolist() == [fmt.hi, fmt.lo]


# OCP Microscaling Formats v1.0, section 5.3: smallest subnormal, smallest normal, largest
@pytest.mark.parametrize(
    ("fmt", "subnormal", "normal", "largest"),
    [
        (FP4_E2M1, 0.5, 1.0, 6.0),
        (FP6_E2M3, 0.125, 1.0, 7.5),
        (FP6_E3M2, 0.0625, 0.25, 28.0),
        (FP8_E4M3, 2.0**-9, 2.0**-6, 448.0),
        (FP8_E5M2, 2.0**-16, 2.0**-14, 57344.0),
    ],
    ids=str,
)
def test_the_limits_are_those_of_ocp(fmt, subnormal, normal, largest):
    assert fmt.decode(torch.tensor([1, 1 << fmt.mantissa], dtype=torch.uint8)).tolist() == [subnormal, normal]
    assert (fmt.lo, fmt.hi) == (-largest, largest)


def test_the_whole_table_of_e2m1():
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert FP4_E2M1.decode(torch.arange(16, dtype=torch.uint8)).tolist() == positive + [-v for v in positive]


def test_the_whole_table_of_e2m3():
    positive = [i / 8 for i in range(16)] + [2 + i / 4 for i in range(8)] + [4 + i / 2 for i in range(8)]
    assert FP6_E2M3.decode(torch.arange(64, dtype=torch.uint8)).tolist() == positive + [-v for v in positive]


def test_the_whole_table_of_e3m2():
    positive = [i / 16 for i in range(4)] + [2.0**e * (4 + i) / 4 for e in range(-2, 5) for i in range(4)]
    assert FP6_E3M2.decode(torch.arange(64, dtype=torch.uint8)).tolist() == positive + [-v for v in positive]


def test_e2m1_ties_go_to_even():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(FP4_E2M1.decode(FP4_E2M1.encode(ties)), even)
    assert torch.equal(FP4_E2M1.decode(FP4_E2M1.encode(-ties)), -even)


def test_e2m1_rounds_as_compressed_tensors_does():
    fp4_utils = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    x = torch.linspace(-7, 7, 4001)
    # the function writes into its argument
    assert torch.equal(FP4_E2M1.decode(FP4_E2M1.encode(x)), fp4_utils.cast_to_fp4(x.clone()))


@pytest.mark.parametrize(
    "fields",
    [
        {"exponent": 0, "mantissa": 3},
        {"exponent": 5, "mantissa": 3},
        {"exponent": 2, "mantissa": -1},
        {"exponent": 4, "mantissa": 3, "special": "inf"},
    ],
    ids=str,
)
def test_impossible_minifloats_are_refused(fields):
    with pytest.raises(SpecError):
        Float(**fields)


def test_a_minifloat_without_a_positive_number_is_refused():
    with pytest.raises(SpecError, match="no number but zero"):
        Float(1, 0, "ieee")
