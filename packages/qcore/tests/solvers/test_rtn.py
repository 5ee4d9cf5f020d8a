"""Laws of rounding to nearest: a search never makes the error larger, what is measured is what is stored, rows are independent."""

from dataclasses import replace

import pytest
import torch
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import (
    FP4_E2M1,
    Codebook,
    Int,
    Offset,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    Tile,
    Unscaled,
    int_weight,
    mx,
    nvfp4,
    quantize,
)
from qcore.solvers import RTN
from qcore.testing import check_solver

DOUBLE = QuantSpec(format=Int(4), granularity=PerGroup(16), scale=QuantSpec(format=Int(6, signed=False), granularity=PerGroup(3), scale="float16"))
SPECS = {
    "int4": int_weight(4, 32),
    "int4-channel": int_weight(4, scale="bfloat16"),
    "int3-zero-point": int_weight(3, 32, asymmetric=True),
    "int2-offset": QuantSpec(format=Int(2), granularity=PerGroup(32), offset=Offset.VALUE, scale="float16"),
    "uint4-zero-point": QuantSpec(format=Int(4, signed=False), granularity=PerGroup(32), offset=Offset.CODE),
    "int4-tensor": QuantSpec(format=Int(4), granularity=PerTensor()),
    "int4-input": QuantSpec(format=Int(4), granularity=PerChannel(1)),
    "int4-ragged-tiles": QuantSpec(format=Int(4), granularity=Tile(5, 40)),
    "int4-double": DOUBLE,
    "fp4": QuantSpec(format=FP4_E2M1, granularity=PerGroup(32), scale="float16"),
    "mxfp4": mx(),
    "mxint8": mx(Int(8)),
    "nvfp4": nvfp4(),
    "codebook": QuantSpec(format=Codebook(3), granularity=PerGroup(32)),
    "codebook-block": QuantSpec(format=Codebook(2, per_block=True), granularity=Tile(4, 32)),
    "codebook-pairs": QuantSpec(format=Codebook(5, dim=2), granularity=PerGroup(32)),
    "codebook-unscaled": QuantSpec(format=Codebook(4), granularity=Unscaled()),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@pytest.fixture
def w() -> torch.Tensor:
    """[12, 96] with heavy tails, a row of zeros, and rows of very different size."""
    torch.manual_seed(0)
    w = torch.randn(12, 96) ** 3 * 0.02
    w[3] = 0
    w[4] *= 50
    return w


def sse(w: torch.Tensor, q) -> float:
    return float((w.double() - q.dequantize().double()).square().sum())


@every_spec
def test_without_clipping_it_is_quantize(w, spec):
    mine, plain = RTN(clip="none").solve(w, spec, {}), quantize(w, spec)
    assert mine.parts.keys() == plain.parts.keys()
    for name in plain.parts:
        assert torch.equal(mine.parts[name], plain.parts[name]), name
        assert mine.parts[name].dtype == plain.parts[name].dtype, name


@every_spec
def test_the_search_never_makes_the_error_larger(w, spec):
    none, narrow, wide = (RTN(clip="none"), RTN(signed_scale=False), RTN())
    # 1e-6: the search compares sums of float32
    assert sse(w, narrow.solve(w, spec, {})) <= sse(w, none.solve(w, spec, {})) * (1 + 1e-6)
    assert sse(w, wide.solve(w, spec, {})) <= sse(w, narrow.solve(w, spec, {})) * (1 + 1e-6)


@every_spec
def test_codes_are_the_nearest_under_the_stored_parts(w, spec):
    q = RTN().solve(w, spec, {})
    again = quantize(w, spec, {name: p for name, p in q.parts.items() if name != "codes"})
    assert torch.equal(q.codes, again.codes)
    assert torch.isfinite(q.dequantize()).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_what_the_spec_stores(w, dtype):
    s = RTN().solve(w, int_weight(3, 32, scale=dtype), {}).scale()
    assert torch.equal(s, s.to(getattr(torch, dtype)).float())


def test_nested_scales_are_searched_under_fixed_upper_scales(w):
    for spec in (nvfp4(), DOUBLE):
        searched, plain = RTN().solve(w, spec, {}), quantize(w, spec)
        assert torch.equal(searched.parts["scale.scale"], plain.parts["scale.scale"])
        assert not torch.equal(searched.parts["scale.codes"], plain.parts["scale.codes"])


def test_a_negative_scale_puts_the_longer_end_of_the_grid_above_zero():
    w = torch.tensor([[8.0, -7.0, 3.0, 1.0], [-8.0, 7.0, 3.0, 1.0]])  # the first row is exact only when mirrored
    spec = QuantSpec(format=Int(4), granularity=PerChannel(0))
    q = RTN().solve(w, spec, {})
    assert torch.equal(q.dequantize(), w)
    assert q.scale().flatten().tolist() == [-1, 1]
    assert (RTN(signed_scale=False).solve(w, spec, {}).scale() > 0).all()


def test_offsets_and_powers_of_two_get_no_negative_scales(w):
    for name in ("int3-zero-point", "mxfp4", "mxint8", "int4-double"):
        assert (RTN().solve(w, SPECS[name], {}).scale() >= 0).all(), name


def test_one_bit_scales_are_mean_magnitudes(w):
    q = RTN().solve(w, QuantSpec(format=Int(1), granularity=PerGroup(32)), {})
    assert torch.allclose(q.scale(), w.abs().view(12, 3, 32).mean(-1), rtol=1e-6)
    assert (q.dequantize()[3] == 0).all()  # the row of zeros


@pytest.mark.parametrize("p", [1.0, 2.4])
def test_norm_is_the_norm_that_is_minimized(w, p):
    spec = SPECS["int3-zero-point"]  # the same candidates for every norm: nothing is polished where there is an offset
    error = lambda norm: RTN(norm=norm).solve(w, spec, {}).dequantize().sub(w).abs().pow(p).sum()
    assert error(p) < error(2.0)


def test_weights_of_the_gram_lower_the_weighted_error(w):
    torch.manual_seed(1)
    h = torch.rand(96) ** 6 + 1e-3
    weighted = lambda q: float((w - q.dequantize()).square().mul(h).sum())
    spec = int_weight(3, 32)
    seen = {"gram": torch.diag(h)}
    # exact optima are not claimed (a grid of candidates), but a clear gain on inputs so uneven is
    assert weighted(RTN(weighted=True).solve(w, spec, seen)) < 0.9 * weighted(RTN().solve(w, spec, seen))


def test_each_part_is_weighted_by_its_own_gram(w):
    torch.manual_seed(1)
    grams = torch.stack([torch.diag(torch.rand(96) ** 6 + 1e-3) for _ in range(3)])
    spec = int_weight(3, 32)
    whole = RTN(weighted=True).solve(w, spec, {"gram": grams})
    for p in range(3):
        rows = slice(4 * p, 4 * p + 4)
        assert torch.equal(whole.codes[rows], RTN(weighted=True).solve(w[rows], spec, {"gram": grams[p]}).codes)


def test_the_gram_is_wanted_only_for_weights(w):
    assert RTN().observes == ()
    with pytest.raises(CalibrationError, match="got no 'gram'"):
        RTN(weighted=True).solve(w, int_weight(4, 32), {})


@pytest.mark.parametrize("spec", [SPECS["int4"], SPECS["int3-zero-point"], SPECS["mxfp4"]], ids=["int4", "zero-point", "mxfp4"])
def test_rows_are_independent_of_how_many_are_searched_together(spec):
    torch.manual_seed(0)
    w = torch.randn(3000, 64)  # more than one pass of the search: 2^17 / 32 = 4096 rows of a group, 2^17 / 64 = 2048 of a channel
    spec = replace(spec, granularity=PerChannel(0)) if spec is SPECS["int4"] else spec
    whole, piece = RTN(steps=5).solve(w, spec, {}), RTN(steps=5).solve(w[2040:2060], spec, {})
    assert torch.equal(whole.codes[2040:2060], piece.codes)


def test_frozen_entries_are_coded_as_zero_and_do_not_move_the_scale(w):
    frozen = torch.full_like(w, torch.nan)
    frozen[:, 5] = 1000.0
    loud = w.clone()
    loud[:, 5] = 1000.0
    for name in ("int4", "int3-zero-point", "nvfp4", "codebook"):
        q = RTN().solve(loud, SPECS[name], {}, frozen)
        quiet = w.clone()
        quiet[:, 5] = 0
        nearest_zero = quantize(torch.zeros_like(w), SPECS[name], {n: p for n, p in q.parts.items() if n != "codes"})
        assert torch.equal(q.codes[:, 5], nearest_zero.codes[:, 5])
        free = torch.arange(96) != 5
        best = RTN().solve(quiet, SPECS[name], {})
        gap = (q.dequantize() - w)[:, free].square().sum() - (best.dequantize() - w)[:, free].square().sum()
        assert gap <= 1e-6 + 0.05 * (best.dequantize() - w)[:, free].square().sum()


def test_nothing_is_stored_for_nan():
    w = torch.ones(2, 32)
    w[1, 7] = torch.nan
    with pytest.raises(SpecError, match=r"1 of 64 values are NaN or infinite \(first at \(1, 7\)\)"):
        RTN().solve(w, int_weight(4, 32), {})


@pytest.mark.parametrize("options", [{"clip": "mad"}, {"norm": 0}, {"shrink": 0}, {"shrink": 1.5}, {"steps": 0}])
def test_options_are_checked(options):
    with pytest.raises(SpecError):
        RTN(**options)


@pytest.mark.parametrize("solver", [RTN(), RTN(clip="none"), RTN(weighted=True)], ids=repr)
def test_rtn_keeps_the_contract_of_solvers(solver):
    for spec in (SPECS["int4"], SPECS["int3-zero-point"], SPECS["nvfp4"]):
        check_solver(solver, spec)
