"""Laws of GPTQ: the paper's codes, never worse than nearest, nearest where nothing is correlated, and every shape and spec."""

import logging
from dataclasses import replace

import pytest
import torch
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import (
    FP4_E2M1,
    Codebook,
    Float,
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
from qcore.numbers.granularity import block_range, spread
from qcore.numbers.tensor import scale_parts
from qcore.solvers import GPTQ, RTN
from qcore.testing import check_solver

DOUBLE = QuantSpec(format=Int(4), granularity=PerGroup(16), scale=QuantSpec(format=Int(6, signed=False), granularity=PerGroup(3), scale="float16"))
SPECS = {
    "int4": int_weight(4, 16),
    "int3": int_weight(3, 16),
    "int2": int_weight(2, 16),
    "int1": QuantSpec(format=Int(1), granularity=PerGroup(16)),
    "int4-channel": int_weight(4),
    "int3-zero-point": int_weight(3, 16, asymmetric=True),
    "int2-offset": QuantSpec(format=Int(2), granularity=PerGroup(16), offset=Offset.VALUE, scale="float16"),
    "int4-tensor": QuantSpec(format=Int(4), granularity=PerTensor()),
    "int4-input": QuantSpec(format=Int(4), granularity=PerChannel(1)),
    "int4-ragged-tiles": QuantSpec(format=Int(4), granularity=Tile(5, 20)),
    "int4-double": DOUBLE,
    "fp4": QuantSpec(format=FP4_E2M1, granularity=PerGroup(16)),
    "fp6": QuantSpec(format=Float(2, 3), granularity=PerChannel(0)),
    "mxfp4": mx(group=16),
    "nvfp4": nvfp4(),
    "codebook": QuantSpec(format=Codebook(3), granularity=PerGroup(16)),
    "codebook-block": QuantSpec(format=Codebook(2, per_block=True), granularity=Tile(6, 24)),
    "codebook-pairs": QuantSpec(format=Codebook(5, dim=2), granularity=PerGroup(16)),
    "codebook-block-triples": QuantSpec(format=Codebook(4, dim=3, per_block=True), granularity=Tile(6, 24)),
    "codebook-unscaled": QuantSpec(format=Codebook(4), granularity=Unscaled()),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def problem(N: int = 12, K: int = 48, T: int = 150, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram of strongly correlated inputs of uneven size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(K, dtype=dtype) + 0.3 * torch.randn(K, K, generator=g, dtype=dtype)
    X = (torch.randn(T, K, generator=g, dtype=dtype) @ mix) * torch.rand(K, generator=g, dtype=dtype).add(0.1)
    return 0.05 * torch.randn(N, K, generator=g, dtype=dtype), X.T @ X / T


def loss(w: torch.Tensor, q, gram: torch.Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ)"""
    values = q if isinstance(q, torch.Tensor) else q.dequantize()
    delta = w.double() - values.double()
    return float(((delta @ gram.double()) * delta).sum())


def textbook(w: torch.Tensor, gram: torch.Tensor, spec: QuantSpec, damp: float, order: torch.Tensor | None = None) -> torch.Tensor:
    """Algorithm 1 as the paper's script has it: invert, factor the inverse, update all columns to the right.  Scales without clipping."""
    N, K = w.shape
    block = spec.granularity.block((N, K))
    order = torch.arange(K) if order is None else order
    h = gram + damp * gram.diagonal().mean() * torch.eye(K, dtype=gram.dtype)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order])), upper=True)
    w, codes = w.clone()[:, order], torch.empty(N, K, dtype=torch.int8)
    static = not torch.equal(order, torch.arange(K))
    whole = scale_parts(*block_range(w[:, order.argsort()], block), spec)
    for i in range(K):
        k = int(order[i])
        if static:
            parts = {name: p[:, [k // block[1]]] for name, p in whole.items()}
        elif i % block[1] == 0:
            parts = scale_parts(*block_range(w[:, i : i + block[1]], (block[0], block[1])), spec)
        q = quantize(w[:, [i]], replace(spec, granularity=PerChannel(0)), {name: spread(p, (block[0], 1), (N, 1)) for name, p in parts.items()})
        codes[:, k] = q.codes[:, 0]
        error = (w[:, i] - q.dequantize()[:, 0]) / U[i, i]
        w[:, i:] -= torch.outer(error, U[i, i:])
    return codes


@pytest.mark.parametrize("K", [7, 96, 150])
@pytest.mark.parametrize("static", [False, True], ids=["natural-order", "act-order"])
@pytest.mark.parametrize(
    "spec",
    [int_weight(4), int_weight(3, 5), int_weight(2, 5, asymmetric=True), QuantSpec(format=Int(3), granularity=Tile(4, 50))],
    ids=["channel", "group", "zero-point", "tile"],
)
def test_codes_are_those_of_the_inverse_cholesky_form(spec, static, K):
    K = K if K % 5 == 0 or spec.granularity.name != "group" else K - K % 5
    w, h = problem(12, K, dtype=torch.float64)
    order = h.diagonal().argsort(descending=True) if static else None
    q = GPTQ(clip="none", act_order=static, damp=0.02, sweeps=0).solve(w, spec, {"gram": h})
    assert torch.equal(q.codes.to(torch.int8), textbook(w, h, spec, 0.02, order))


@every_spec
@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"sweeps": 0}, {"act_order": False, "sweeps": 0}], ids=str)
def test_loss_is_below_nearest_for_correlated_inputs(spec, options):
    w, h = problem()
    nearest = RTN().solve(w, spec, {})
    assert loss(w, GPTQ(**options).solve(w, spec, {"gram": h}), h) < 0.95 * loss(w, nearest, h)


@every_spec
@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"act_order": False, "static_groups": True}], ids=str)
def test_uncorrelated_inputs_give_nearest(spec, options):
    w, _ = problem()
    q, nearest = GPTQ(sweeps=0, **options).solve(w, spec, {"gram": torch.eye(48)}), RTN().solve(w, spec, {})
    for name in nearest.parts:
        assert torch.equal(q.parts[name], nearest.parts[name]), name
        assert q.parts[name].dtype == nearest.parts[name].dtype, name


@every_spec
def test_the_same_inputs_give_the_same_bytes(spec):
    w, h = problem()
    a, b = (GPTQ().solve(w.clone(), spec, {"gram": h.clone()}) for _ in range(2))
    assert all(torch.equal(a.parts[name], b.parts[name]) for name in a.parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_left_as_they_were(dtype):
    w, h = problem()
    w = w.to(dtype)
    kept = w.clone(), h.clone()
    GPTQ().solve(w, int_weight(4, 16), {"gram": h}, torch.full_like(w, torch.nan))
    assert torch.equal(w, kept[0]) and torch.equal(h, kept[1])


@every_spec
def test_every_sweep_lowers_the_loss(spec):
    w, h = problem()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(48)  # what the descent minimizes
    losses = [loss(w, GPTQ(sweeps=n, damp=0.01).solve(w, spec, {"gram": h}), damped) for n in range(4)]
    assert losses[1] < losses[0]
    assert losses[2] <= losses[1] * (1 + 1e-5) and losses[3] <= losses[2] * (1 + 1e-5)  # float32 sums


def test_a_swept_code_cannot_be_bettered_alone():
    """After enough sweeps no single change of a code lowers the loss: all 16 codes of every weight are tried."""
    w, h = problem(4, 24, dtype=torch.float64)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    q = GPTQ(sweeps=30, damp=0.01).solve(w, int_weight(4, 8, scale="float32"), {"gram": h})
    s = spread(q.scale().double(), (1, 8), (4, 24))
    delta = w - q.codes * s
    for code in range(-8, 8):
        change = (q.codes - code) * s  # what is added to the error
        gain = change.square() * damped.diagonal() + 2 * change * (delta @ damped)
        assert gain.min() > -1e-9 * damped.diagonal().mean()


def test_act_order_keeps_codes_where_the_weights_are():
    w, h = problem()
    q = GPTQ().solve(w, int_weight(8, 16), {"gram": h})
    assert (q.dequantize() - w).abs().max() < 0.1 * w.abs().max()


def test_act_order_rounds_the_heaviest_column_to_nearest():
    w, h = problem()
    h[40] *= 30
    h[:, 40] *= 30
    spec = int_weight(4, 16)
    q = GPTQ(sweeps=0).solve(w, spec, {"gram": h})
    nearest = quantize(w, spec, {"scale": q.parts["scale"]})
    assert torch.equal(q.codes[:, 40], nearest.codes[:, 40])
    assert not torch.equal(q.codes, nearest.codes)


def test_each_part_is_solved_with_its_own_gram():
    grams = torch.stack([problem(dtype=torch.float64, seed=s)[1] for s in range(3)])
    w, _ = problem(dtype=torch.float64)
    for spec, options in ((SPECS["int4"], {"act_order": False}), (SPECS["codebook-block-triples"], {"act_order": False})):
        spec = replace(spec, granularity=Tile(4, 24)) if spec.format.per_block else spec
        whole = GPTQ(**options).solve(w, spec, {"gram": grams})
        for p in range(3):
            rows = slice(4 * p, 4 * p + 4)
            assert torch.equal(whole.codes[rows], GPTQ(**options).solve(w[rows], spec, {"gram": grams[p]}).codes)


def test_depthwise_weights_have_one_row_for_each_gram():
    torch.manual_seed(0)
    X = torch.randn(64, 100, 9) @ torch.randn(64, 9, 9)
    w, h = torch.randn(64, 9), X.mT @ X / 100
    q, nearest = GPTQ().solve(w, int_weight(3), {"gram": h}), RTN().solve(w, int_weight(3), {})
    per_part = lambda q: (((w - q.dequantize()).unsqueeze(1) @ h) @ (w - q.dequantize()).unsqueeze(2)).sum()
    assert per_part(q) < 0.7 * per_part(nearest)


def test_frozen_values_are_made_up_for_by_the_others():
    w, h = problem()
    frozen = torch.full_like(w, torch.nan)
    frozen[:, 3] = w[:, 3] + 0.05
    frozen[:4, 40] = 0.0
    standing = lambda q: torch.where(frozen.isnan(), q.dequantize(), frozen)
    for name in ("int4", "int3-zero-point", "nvfp4", "codebook", "codebook-pairs"):
        for options in ({}, {"sweeps": 0}, {"act_order": False, "sweeps": 0}):
            knowing = GPTQ(**options).solve(w, SPECS[name], {"gram": h}, frozen)
            unaware = GPTQ(**options).solve(w, SPECS[name], {"gram": h})
            assert loss(w, standing(knowing), h) < 0.9 * loss(w, standing(unaware), h), (name, options)
            if SPECS[name].format.dim == 1:
                zero = quantize(torch.zeros_like(w), SPECS[name], {n: p for n, p in knowing.parts.items() if n != "codes"})
                assert torch.equal(knowing.codes[~frozen.isnan()], zero.codes[~frozen.isnan()]), (name, options)


def test_inputs_never_seen_are_rounded_to_nearest():
    w, h = problem()
    dead = [0, 31, 47]
    h[dead] = 0
    h[:, dead] = 0
    for damp in (0.03, 0.0):
        for options in ({}, {"act_order": True}, {"sweeps": 1}):
            q = GPTQ(damp=damp, **options).solve(w, SPECS["int4"], {"gram": h})
            nearest = quantize(w, SPECS["int4"], {"scale": q.parts["scale"]})
            assert torch.equal(q.codes[:, dead], nearest.codes[:, dead])
    assert torch.equal(GPTQ(sweeps=0).solve(w, SPECS["int4"], {"gram": torch.zeros(48, 48)}).codes, RTN().solve(w, SPECS["int4"], {}).codes)


@every_spec
def test_degenerate_calibration_is_solved(spec):
    w, _ = problem()
    w[5] = 0
    x = torch.randn(1, 48)
    q = GPTQ().solve(w, spec, {"gram": x.T @ x})  # one row of inputs: rank 1
    assert torch.isfinite(q.dequantize()).all()
    assert loss(w, q, x.T @ x) < loss(w, RTN().solve(w, spec, {}), x.T @ x)


@pytest.mark.parametrize(("N", "K"), [(1, 48), (1, 1), (3, 33), (5, 130)])
def test_any_shape(N, K):
    w, h = problem(N, K)
    for spec in (int_weight(4), SPECS["int4-tensor"], SPECS["int4-ragged-tiles"], SPECS["fp6"]):
        q = GPTQ().solve(w, spec, {"gram": h})
        assert q.shape == (N, K) and loss(w, q, h) <= loss(w, RTN().solve(w, spec, {}), h) * (1 + 1e-6)


def test_damping_is_raised_until_the_gram_factors_and_the_value_is_told(caplog):
    w, h = problem()
    h -= 0.05 * h.diagonal().mean() * torch.eye(48)  # smallest eigenvalues just below zero
    with caplog.at_level(logging.WARNING, logger="qcore"):
        q = GPTQ(damp=1e-4).solve(w, SPECS["int4"], {"gram": h})
    assert "is not positive definite with damping 0.0001; 0.001 was used" in caplog.messages[0]
    assert "; 0.1 was used" in caplog.messages[-1]
    assert torch.isfinite(q.dequantize()).all()


def test_a_matrix_that_is_no_gram_is_an_error():
    w, h = problem()
    with pytest.raises(CalibrationError, match="no Cholesky factor even with 3 times its mean diagonal"):
        GPTQ().solve(w, SPECS["int4"], {"gram": h - 100 * h.diagonal().max() * (torch.ones(48, 48) - torch.eye(48))})


def test_errors_name_both_sides():
    w, h = problem()
    with pytest.raises(CalibrationError, match="got no 'gram'"):
        GPTQ().solve(w, SPECS["int4"], {})
    with pytest.raises(CalibrationError, match=r"shape \(1, 5, 5\) does not fit a weight \[12, 48\]"):
        GPTQ().solve(w, SPECS["int4"], {"gram": torch.eye(5)})
    bad = h.clone()
    bad[3, 4] = bad[4, 3] = torch.inf
    with pytest.raises(CalibrationError, match="2 of 2304 entries of the Gram are NaN or infinite"):
        GPTQ().solve(w, SPECS["int4"], {"gram": bad})
    with pytest.raises(SpecError, match="does not divide K=48"):
        GPTQ().solve(w, int_weight(4, 64), {"gram": h})
    with pytest.raises(SpecError, match="vectors of 2 inputs"):
        GPTQ().solve(w, QuantSpec(format=Codebook(4, dim=2), granularity=PerGroup(3)), {"gram": h})
    with pytest.raises(SpecError, match="damp=-1"):
        GPTQ(damp=-1)
    with pytest.raises(SpecError, match="sweeps"):
        GPTQ(sweeps=-1)


@pytest.mark.parametrize("solver", [GPTQ(), GPTQ(act_order=False), GPTQ(sweeps=0), GPTQ(clip="none", act_order=False, static_groups=True)], ids=repr)
def test_gptq_keeps_the_contract_of_solvers(solver):
    for spec in (SPECS["int4"], SPECS["int3-zero-point"], SPECS["nvfp4"]):
        check_solver(solver, spec)
