"""`check_format`: what numbers a code can stand for."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from qcore.numbers import NumberFormat, PerTensor, QuantSpec, spec_from_dict, spec_to_dict
from qcore.testing.contract import by_itself, check_named

JUNK = 1e3  # at scale 1: what stands where a block at the edge of a tensor is filled up


def check_format(fmt: NumberFormat) -> None:
    """A number format rounds to the nearest of at most 2**bits numbers, its codes survive decode → encode, and it is plain data."""
    check_named(fmt, "format", "encode", "decode")
    _check_data(fmt)
    assert fmt.lo < fmt.hi, f"{fmt}: lo={fmt.lo} is not below hi={fmt.hi}"
    x = format_values(fmt)
    params = _fitted(fmt, x)
    codes = _encoded(fmt, x, params)
    with by_itself(f"{fmt}: decode"):
        values = fmt.decode(codes, params)
    assert isinstance(values, Tensor) and values.dtype == torch.float32 and values.shape == x.shape, (
        f"{fmt}: decode gives float32 of the values' shape {tuple(x.shape)}, got {_described(values)}"
    )
    assert torch.isfinite(values).all(), f"{fmt}: decode(encode(x)) is not finite; encode must saturate, not overflow"
    again = fmt.encode(values, params)
    kept = fmt.decode(again, params)
    assert torch.equal(kept, values), f"{fmt}: encode(decode(c)) stands for another number than c in {int((kept != values).sum())} places"
    count = codes.unique().numel()
    assert count <= 2**fmt.bits, f"{fmt}: {count} different codes, more than 2**{fmt.bits}"
    if fmt.dim == 1:
        _check_scalar_format(fmt, x, values)
    _check_shapes(fmt, x, params, values)
    spec = QuantSpec(format=fmt, granularity=PerTensor())
    data = json.loads(json.dumps(spec_to_dict(spec)))
    assert spec_from_dict(data, {fmt.name: type(fmt)}) == spec, (
        f"{fmt}: its dataclass fields do not rebuild it; a checkpoint stores them and nothing else"
    )


def format_values(fmt: NumberFormat) -> Tensor:
    """Already scaled values that reach every code of the format."""
    if fmt.dim > 1:
        return torch.randn(2048, fmt.dim, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) / 2
    if fmt.lo > 0:  # scales: positive numbers over many orders of magnitude
        return torch.logspace(-6, 6, 1001).clamp(fmt.lo, fmt.hi)
    top = min(fmt.hi, 1e4)
    return torch.linspace(max(fmt.lo, -1e4), top, 4001)


def _check_data(fmt: NumberFormat) -> None:
    own = type(fmt)
    assert is_dataclass(fmt) and own.__dataclass_params__.frozen, (
        f"{own.__name__} is no frozen dataclass; put @dataclass(frozen=True) above it: its fields are what a checkpoint stores of it"
    )
    twin = own(**{f.name: getattr(fmt, f.name) for f in fields(fmt) if f.init})
    assert twin == fmt and hash(twin) == hash(fmt), (
        f"{fmt}: two with equal fields are not equal, or have another hash; leave eq and hash to dataclass"
    )
    assert type(fmt.bits) is int and fmt.bits > 0, f"{fmt}: bits is the whole number of bits that one code is stored in, got {fmt.bits!r}"


def _fitted(fmt: NumberFormat, x: Tensor) -> dict[str, Tensor]:
    """The parts of one block; values of weight 0 must not have moved them for the worse."""
    if not fmt.parts:
        return {}
    junk = torch.full_like(x[: len(x) // 4], JUNK)
    padded, weight = torch.cat([x, junk]), torch.cat([torch.ones_like(x), torch.zeros_like(junk)])
    with by_itself(f"{fmt}: fit"):
        found, filled = fmt.fit(x.unsqueeze(0)), fmt.fit(padded.unsqueeze(0), weight.unsqueeze(0))
    for parts in (found, filled):
        assert isinstance(parts, Mapping) and set(parts) == set(fmt.parts), (
            f"{fmt}: fit() returned {_described(parts)}, `parts` promises {sorted(fmt.parts)}"
        )

    def block(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: part if name in fmt.shared else part[0] for name, part in parts.items()}

    def error(parts: dict[str, Tensor]) -> float:
        return float((fmt.decode(fmt.encode(x, parts), parts) - x).square().mean())

    here, there = error(block(found)), error(block(filled))
    assert there <= 2 * here + 1e-6, (
        f"{fmt}: fit() heeds values of weight 0: with such beside them the others err by {there:.3g} (mean square), without by {here:.3g}"
    )
    return block(found)


def _encoded(fmt: NumberFormat, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    kept = x.clone()
    with by_itself(f"{fmt}: encode"):
        codes = fmt.encode(x, params)
        again = fmt.encode(kept.clone(), params)
    assert torch.equal(x, kept), f"{fmt}: encode wrote into x"
    shape = x.shape if fmt.dim == 1 else x.shape[:-1]
    assert isinstance(codes, Tensor) and codes.shape == shape, (
        f"{fmt}: encode made {_described(codes)} from values of shape {tuple(x.shape)}, wanted codes of shape {tuple(shape)}"
    )
    assert torch.equal(again, codes), f"{fmt}: encode gives other codes when it is called again; rounding is not left to chance"
    assert not codes.is_floating_point(), f"{fmt}: codes are {codes.dtype}; they are integers"
    assert codes.dtype.itemsize <= 2, (
        f"{fmt}: codes of {fmt.bits} bits are {codes.dtype}, {codes.dtype.itemsize} bytes each; use int8, uint8 or int16"
    )
    return codes


def _check_shapes(fmt: NumberFormat, x: Tensor, params: Mapping[str, Tensor], values: Tensor) -> None:
    """Blocks come as matrices: the same values in another shape have the same codes."""
    n = len(x) // 2 * 2
    with by_itself(f"{fmt}: encode of values in two dimensions"):
        codes = fmt.encode(x[:n].unflatten(0, (2, -1)), params)
        other = fmt.decode(codes, params)
    same = other.shape == (2, n // 2, *x.shape[1:]) and torch.equal(other.flatten(0, 1), values[:n])
    assert same, f"{fmt}: the same values as a matrix [2, {n // 2}] stand for other numbers; round element by element"


def _check_scalar_format(fmt: NumberFormat, x: Tensor, values: Tensor) -> None:
    assert bool((values.diff() >= 0).all()), f"{fmt}: a larger x got a smaller number; encode is not monotone"
    assert values.min() >= fmt.lo * (1 + 1e-6) - 1e-6 or fmt.lo > 0, f"{fmt}: reaches {values.min():.6g}, below lo={fmt.lo}"
    assert values.max() <= fmt.hi * (1 + 1e-6), f"{fmt}: reaches {values.max():.6g}, above hi={fmt.hi}"
    grid = values.unique()
    best = (x.unsqueeze(1) - grid).abs().amin(1)
    worse = (x - values).abs() - best
    assert bool((worse <= 1e-6 * x.abs() + 1e-9).all()), (
        f"{fmt}: encode is not nearest: {float(x[worse.argmax()]):.6g} became {float(values[worse.argmax()]):.6g}, "
        f"{float(worse.max()):.3g} further off than another of its numbers"
    )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return str(sorted(value)) if isinstance(value, Mapping) else repr(value)
