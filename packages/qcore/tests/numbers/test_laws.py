"""Laws of every format, and of every way to store a tensor in it: formats × granularities × offsets × scale storage."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qcore.numbers import (
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    Codebook,
    Float,
    Int,
    Offset,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    PowerOfTwo,
    QuantSpec,
    Tile,
    Unscaled,
    fake_quantize,
    quantize,
)
from qcore.numbers.granularity import block_range, spread
from qcore.numbers.tensor import per_value_params
from torch import Tensor

INTS = [Int(b, signed=s) for b in range(1, 9) for s in (True, False)]
FLOATS = [FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, FP8_E5M2, Float(5, 0), Float(1, 2)]
BOOKS = [Codebook(2), Codebook(4), Codebook(3, per_block=True), Codebook(4, dim=2), Codebook(2, dim=2, per_block=True)]
GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(-1), PerToken(), PerGroup(10), Tile(3, 4), Tile(4, 26), Unscaled()]
SCALES = [
    "float32",
    "float16",
    "bfloat16",
    *[QuantSpec(format=PowerOfTwo(rule), granularity=Unscaled()) for rule in ("floor", "ceil", "even")],
    QuantSpec(format=FP8_E4M3, granularity=PerTensor()),
    QuantSpec(format=Int(6, signed=False), granularity=PerChannel(0), scale="float16"),
]
SHAPES = [(7, 130), (2, 3, 20), (1, 10), (4, 20), (130,), (0, 20)]


@cache
def every_spec() -> list[QuantSpec]:
    specs = []
    for fmt in [*INTS, *FLOATS, *BOOKS]:
        for granularity in GRANULARITIES:
            for offset in Offset:
                for scale in SCALES:
                    try:
                        specs.append(QuantSpec(format=fmt, granularity=granularity, offset=offset, scale=scale))
                    except SpecError:
                        continue
    return specs


def tensor_of(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    match kind:
        case "cubes":
            return x**3
        case "positive":
            return x.abs() + 0.5
        case "zero blocks":
            return torch.where(torch.arange(shape[-1]) % 20 < 10, 0.0, x)
        case "zeros":
            return torch.zeros(shape)
        case "one value":
            return torch.full(shape, 0.37)
        case "tiny":
            return x * 1e-6
        case "large":
            return x * 1e3
    return x


KINDS = ["normal", "cubes", "positive", "zero blocks", "zeros", "one value", "tiny", "large"]
cases = st.tuples(st.sampled_from(every_spec()), st.sampled_from(SHAPES), st.sampled_from(KINDS), st.integers(0, 1000))
law = settings(max_examples=250, deadline=None, derandomize=True, database=None)


def quantized(case):
    """The tensor, and its stored form; None where the spec does not fit the shape."""
    spec, shape, kind, seed = case
    try:
        spec.check(shape)
    except SpecError:
        return None
    if spec.format.parts and 0 in shape:
        return None
    x = tensor_of(shape, kind, seed)
    return x, quantize(x, spec)


def grid_values(q) -> Tensor:
    """Every number that each code of `q` could stand for, scaled.  [*shape, 2^bits, dim]"""
    fmt = q.spec.format
    if "codebook" in q.parts:
        book = per_value_params(q.spec, q.params(), q.shape)["codebook"]
        table = book.unsqueeze(-1) if fmt.dim == 1 else book
    else:
        table = fmt.decode(every_code(fmt)).unsqueeze(-1)
    values = table.expand(*q.codes.shape, *table.shape[-2:])
    if not q.spec.scaled:
        return values
    # one scale for all values of a vector only where blocks are whole vectors
    s, o = (spread(t, q.block, q.shape).expand(q.shape).unflatten(-1, (-1, fmt.dim)).unsqueeze(-2) for t in (q.scale(), offset_of(q)))
    return (values - o) * s if q.spec.offset is Offset.CODE else values * s + o


def offset_of(q) -> Tensor:
    return q.parts["offset"].float() if "offset" in q.parts else torch.zeros_like(q.scale())


def every_code(fmt) -> Tensor:
    """All codes of a format without fitted parts that stand for a number."""
    if isinstance(fmt, Int):
        if fmt.bits == 1 and fmt.signed:
            return torch.tensor([-1, 0], dtype=torch.int8)
        return torch.arange(int(fmt.lo), int(fmt.hi) + 1, dtype=torch.int8 if fmt.signed else torch.uint8)
    codes = torch.arange(1 << fmt.bits).to(torch.uint8)
    return codes[fmt.decode(codes).isfinite()] if isinstance(fmt, Float) else codes[:-1]


FIXED = [*INTS, *FLOATS, PowerOfTwo()]


@pytest.mark.parametrize("fmt", FIXED, ids=str)
def test_encoding_what_was_decoded_gives_the_code(fmt):
    codes = every_code(fmt)
    assert len(codes) <= 1 << fmt.bits
    assert torch.equal(fmt.encode(fmt.decode(codes)), codes)


@pytest.mark.parametrize("fmt", FIXED, ids=str)
def test_ends_of_a_format_are_its_smallest_and_largest_numbers(fmt):
    values = fmt.decode(every_code(fmt))
    assert (values.min().item(), values.max().item()) == (fmt.lo, fmt.hi)


@pytest.mark.parametrize("fmt", [*INTS, *FLOATS], ids=str)
def test_encoding_is_nearest_monotone_and_saturates(fmt):
    x = torch.linspace(1.3 * fmt.lo - 1, 1.3 * fmt.hi + 1, 3001)
    y = fmt.decode(fmt.encode(x))
    assert (y.diff() >= 0).all()
    table = fmt.decode(every_code(fmt))
    nearest = (x.unsqueeze(1) - table).abs().amin(1)
    assert torch.equal((x - y).abs(), nearest)


@law
@given(cases)
def test_there_are_at_most_two_to_the_bits_codes(case):
    if (made := quantized(case)) is not None:
        q = made[1]
        assert len(q.codes.unique()) <= 1 << q.spec.format.bits


@law
@given(cases)
def test_quantizing_again_with_the_same_parts_changes_nothing(case):
    if (made := quantized(case)) is None:
        return
    x, q = made
    parts = {k: v for k, v in q.parts.items() if k != "codes"}
    once = fake_quantize(x, q.spec, parts)
    assert torch.equal(once, q.dequantize())
    assert torch.equal(fake_quantize(once, q.spec, parts), once)


@law
@given(cases)
def test_every_value_gets_the_nearest_number_of_its_grid(case):
    """So the error is at most half a step inside the range, and the distance to the end outside of it."""
    if (made := quantized(case)) is None or 0 in case[1]:
        return
    x, q = made
    dim = q.spec.format.dim
    if dim > 1 and q.spec.scaled and q.block[-1] % dim:
        return  # a vector with two scales has no one grid
    values = grid_values(q)
    wanted, got = x.unflatten(-1, (-1, dim)), q.dequantize().unflatten(-1, (-1, dim))
    best = (wanted.unsqueeze(-2) - values).double().norm(dim=-1).amin(-1)
    error = (wanted - got).double().norm(dim=-1)
    # a few float32 roundings of numbers as large as the grid
    assert (error <= best + 2e-6 * values.abs().amax((-1, -2))).all()


@law
@given(cases)
def test_larger_values_never_get_smaller_numbers_at_one_scale(case):
    spec, *rest = case
    if spec.format.dim > 1 or spec.format.per_block:
        return
    spec = QuantSpec(format=spec.format, granularity=PerTensor(), offset=spec.offset, scale=spec.scale) if spec.scaled else spec
    if (made := quantized((spec, *rest))) is not None and made[0].numel():
        x, order = made[0].flatten().sort()
        assert (made[1].dequantize().flatten()[order].diff() >= 0).all()
        assert (x.diff() >= 0).all()


@law
@given(cases)
def test_stored_scales_are_what_their_dtype_holds(case):
    if (made := quantized(case)) is None or not isinstance(case[0].scale, str) or not case[0].scaled:
        return
    dtype = getattr(torch, case[0].scale)
    scale = made[1].parts["scale"]
    assert torch.equal(scale.to(dtype).float(), scale)
    assert (scale >= 0).all()
    low, high = block_range(made[0], made[1].block)
    if case[0].format.lo < 0:
        assert ((scale > 0) | (low == high)).all()


@law
@given(cases)
def test_a_whole_dtype_and_layout_do_not_matter(case):
    if (made := quantized(case)) is None:
        return
    x, q = made
    spec = q.spec
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(fake_quantize(strided, spec), q.dequantize())
    assert torch.equal(quantize(x.double(), spec).codes, q.codes)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        y = fake_quantize(half, spec)
        assert y.dtype == dtype
        assert y.shape == x.shape
        assert torch.equal(y, fake_quantize(half.float(), spec).to(dtype))


@law
@given(cases)
def test_zero_stays_zero_where_the_grid_has_it(case):
    spec = case[0]
    if spec.offset is Offset.VALUE or spec.format.parts or spec.format == Int(1):
        return
    if (made := quantized(case)) is not None:
        x, q = made
        assert (q.dequantize()[x == 0] == 0).all()


@pytest.mark.parametrize("spec", [s for s in every_spec() if s.granularity == PerGroup(10) and isinstance(s.scale, str)][::2], ids=str)
def test_blocks_of_zeros_stay_zeros_in_every_format(spec):
    x = tensor_of((4, 20), "zero blocks", 0)
    q = quantize(x, spec)
    if not (spec.format.dim > 1 and q.block[-1] % spec.format.dim):
        assert (q.dequantize()[:, :10] == 0).all()


SHARED = [
    s
    for s in every_spec()
    if isinstance(s.scale, QuantSpec) and s.scale.scaled and not s.format.parts and s.granularity in (PerChannel(0), PerToken(), PerGroup(10))
]


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-8])
@pytest.mark.parametrize("spec", SHARED, ids=str)
def test_a_row_of_zeros_takes_nothing_from_rows_that_share_its_upper_scale(spec, size):
    x = tensor_of((4, 40), "normal", 0) * size
    empty = torch.cat([x[:2], torch.zeros(1, 40), x[2:]])
    alone, beside = quantize(x, spec).dequantize(), quantize(empty, spec).dequantize()
    assert torch.equal(beside[[0, 1, 3, 4]], alone) and not beside[2].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", [s for s in every_spec() if s.granularity == PerToken() and s.scale == "float32"][::5], ids=str)
def test_what_is_no_number_is_refused_with_its_place(spec, bad):
    x = torch.ones(4, 20)
    x[2, 5] = x[3, 0] = bad
    with pytest.raises(SpecError, match=r"2 of 80 values are NaN or infinite \(first at \(2, 5\)\)"):
        quantize(x, spec)
