"""Rounding up or down by what a layer puts out."""

import itertools

import pytest
import torch
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import Codebook, Int, Offset, PerChannel, PerGroup, QuantSpec, int_weight
from qcore.solvers import RTN
from qcore.solvers.adaround import LayerAdaRound
from qcore.testing import check_solver


def inputs(k: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(256, k, generator=g) @ torch.randn(k, k, generator=g)


def error(w: torch.Tensor, values: torch.Tensor, gram: torch.Tensor) -> float:
    delta = (w - values).double()
    return float((delta @ gram.double() * delta).sum())


SPECS = [int_weight(4, 32), int_weight(2, 32), int_weight(3, None), QuantSpec(format=Int(4), granularity=PerGroup(16), offset=Offset.CODE)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_keeps_the_contract(spec):
    check_solver(LayerAdaRound(rounds=60), spec)


def test_of_six_weights_it_comes_near_the_best_of_all_roundings():
    w = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    spec, gram = QuantSpec(format=Int(3), granularity=PerChannel()), torch.full((6, 6), 0.9) + 0.1 * torch.eye(6)  # inputs that are much alike
    found = LayerAdaRound(clip="none").solve(w, spec, {"gram": gram}).dequantize()
    nearest = RTN(clip="none").solve(w, spec, {})
    scale, best = nearest.scale(), 0.0
    for row, z in enumerate(w / scale):
        choices = torch.tensor(list(itertools.product((0, 1), repeat=6)))
        delta = ((z.floor() + choices).clamp(spec.format.lo, spec.format.hi) * scale[row] - w[row]).double()
        best += float((delta @ gram.double() * delta).sum(1).min())
    ours = error(w, found, gram)
    assert best <= ours * (1 + 1e-9)
    assert ours <= 1.05 * best < 0.7 * error(w, nearest.dequantize(), gram)


def test_every_code_is_the_one_above_or_below_its_weight():
    w, gram = torch.randn(16, 32, generator=torch.Generator().manual_seed(3)), (x := inputs(32)).T @ x
    spec = int_weight(4, 32)
    q = LayerAdaRound(clip="none", rounds=100).solve(w, spec, {"gram": gram})
    nearest = RTN(clip="none").solve(w, spec, {})
    z = w / nearest.scale().repeat_interleave(32, 1)
    assert bool(((q.codes - z).abs() <= 1 + 1e-5).all()) and not torch.equal(q.codes, nearest.codes)
    assert torch.equal(q.scale(), nearest.scale())


def test_parts_of_a_grouped_layer_have_inputs_of_their_own():
    w = torch.randn(6, 9, generator=torch.Generator().manual_seed(4))
    grams = torch.stack([(x := inputs(9, seed)).T @ x for seed in range(3)])
    spec, solver = QuantSpec(format=Int(4), granularity=PerChannel()), LayerAdaRound(rounds=80)
    whole = solver.solve(w, spec, {"gram": grams}).dequantize()
    crossed = solver.solve(w, spec, {"gram": grams.roll(1, 0)}).dequantize()
    for i, gram in enumerate(grams):
        rows = slice(2 * i, 2 * i + 2)
        alone = error(w[rows], solver.solve(w[rows], spec, {"gram": gram}).dequantize(), gram)
        assert error(w[rows], whole[rows], gram) == pytest.approx(alone, rel=0.05)  # sums in another order, a code now and then
    off = [sum(error(w[2 * i : 2 * i + 2], own[2 * i : 2 * i + 2], gram) for i, gram in enumerate(grams)) for own in (whole, crossed)]
    assert off[0] < 0.7 * off[1]


def test_frozen_entries_are_worked_around():
    w, gram = torch.randn(8, 16, generator=torch.Generator().manual_seed(5)), (x := inputs(16)).T @ x
    frozen = torch.full_like(w, float("nan"))
    frozen[:, 2] = w[:, 2] + 0.3  # what will stand there is off: the others make good for it
    q = LayerAdaRound().solve(w, int_weight(4, 16), {"gram": gram}, frozen)
    plain = RTN(clip="mse").solve(w, int_weight(4, 16), {}, frozen)

    def off(own) -> float:
        return error(w, torch.where(frozen.isnan(), own.dequantize(), frozen), gram)

    assert off(q) < 0.8 * off(plain)
    assert torch.equal(q.codes[:, 2], plain.codes[:, 2])


def test_correlated_inputs_are_what_it_gains_from():
    w, spec = torch.randn(32, 64, generator=torch.Generator().manual_seed(6)), int_weight(3, 64)
    gram = (x := inputs(64)).T @ x
    ours = LayerAdaRound().solve(w, spec, {"gram": gram}).dequantize()
    assert error(w, ours, gram) < 0.6 * error(w, RTN().solve(w, spec, {}).dequantize(), gram)
    # where inputs are independent, the nearest code is the best one
    apart = LayerAdaRound(clip="none").solve(w, spec, {"gram": torch.eye(64)})
    assert torch.equal(apart.codes, RTN(clip="none").solve(w, spec, {}).codes)


def test_what_cannot_be_is_refused():
    w = torch.randn(4, 8)
    with pytest.raises(SpecError, match="even grid"):
        LayerAdaRound().solve(w, QuantSpec(format=Codebook(2), granularity=PerChannel()), {"gram": torch.eye(8)})
    with pytest.raises(CalibrationError, match="no 'gram'"):
        LayerAdaRound().solve(w, int_weight(4, 8), {})
    with pytest.raises(SpecError, match="rounds >= 1"):
        LayerAdaRound(rounds=0)
