"""The choice of the overlap, and the proxy of cost that it weighs."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import fake_quantize
from qplug_hardware.block_float import BBFP, BFP, bbfp
from qplug_hardware.overlap import choose_overlap, proxy_cost


def squared_error(x: torch.Tensor, mantissa: int):
    return lambda o: float((fake_quantize(x, bbfp(mantissa, o)) - x).square().sum() / x.square().sum())


def outliers(share: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(64, 512, generator=g) * torch.where(torch.rand(64, 512, generator=g) < share, 20.0, 1.0)


def test_the_best_overlap_depends_on_the_tail():
    """Quality alone: normal values want the windows close together, outliers far apart."""
    normal, _ = choose_overlap(6, squared_error(outliers(0.0), 6), weight=1.0)
    tail, _ = choose_overlap(6, squared_error(outliers(0.01), 6), weight=1.0)
    assert tail < normal


def test_cost_alone_takes_the_narrowest_adder_and_ties_the_cheaper():
    assert choose_overlap(6, lambda o: -o, weight=0.0)[0] == 5
    assert choose_overlap(6, lambda o: 1.0, weight=1.0)[0] == 5
    assert choose_overlap(6, lambda o: 1.0, weight=0.5)[0] == 5


def test_scores_are_weighted_between_zero_and_one():
    chosen, rows = choose_overlap(5, {1: 4.0, 2: 1.0, 3: 1.2, 4: 3.0}.__getitem__)
    assert [r.overlap for r in rows] == [1, 2, 3, 4]
    costs = [r.cost for r in rows]
    assert costs == sorted(costs, reverse=True)
    for r in rows:
        assert r.score == pytest.approx(0.5 * (r.loss - 1) / 3 + 0.5 * (r.cost - costs[-1]) / (costs[0] - costs[-1]))
    assert chosen == 3


def test_the_proxy_is_what_its_parts_say():
    """BBFP(4,2): 16 cells, (10 + 12)/2 multiplexers, 8 full and 9 half adders, 5/32.  BFP(4): no multiplexer, 8 and 5."""
    assert proxy_cost(BBFP(4, 2)).logic == 16 + 11 + 8 + 4.5 + 5 / 32
    assert proxy_cost(BFP(4)).logic == 16 + 8 + 2.5 + 5 / 32
    assert proxy_cost(BBFP(4, 2)).storage == 6 + 5 / 32
    assert proxy_cost(BBFP(3, 1)).logic < proxy_cost(BFP(6)).logic


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: choose_overlap(1, lambda o: 0.0), "no overlap from 1"),
        (lambda: choose_overlap(4, lambda o: 0.0, weight=2), "0 to 1"),
        (lambda: choose_overlap(4, lambda o: float("nan")), "overlap 1 is NaN"),
        (lambda: choose_overlap(4, lambda o: 0.0, overlaps=[4]), "use format 'bfp'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(call, words):
    with pytest.raises(SpecError, match=words):
        call()
