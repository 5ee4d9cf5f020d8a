"""Quantization after stabilization: how much closer probabilities stay, and when the arg-max does."""

import pytest
import torch
from qcore.testing import check_module, check_observer
from qplug_perception.petr.dulut import build
from qplug_perception.petr.qans import QANS, SoftmaxDistance, StableSoftmax, quantized_softmax


def logits(sigma: float, rows: int = 400, keys: int = 600, seed: int = 0) -> torch.Tensor:
    return sigma * torch.randn(rows, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantized_before(x: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """softmax of symmetric codes with one scale for the tensor."""
    scale = x.abs().max() / (2 ** (bits - 1) - 1)
    return ((x / scale).round() * scale).softmax(-1)


def l1(p: torch.Tensor, x: torch.Tensor) -> float:
    return (p - x.softmax(-1)).abs().sum(-1).mean().item()


@pytest.mark.parametrize("sigma", [10.0, 20.0, 40.0])
def test_it_is_four_times_closer_than_quantizing_before(sigma):
    x = logits(sigma)
    assert l1(quantized_softmax(x, 20.0), x) <= l1(quantized_before(x), x) / 4


# measured for 600 keys at σ = 10: β and the mean distance
@pytest.mark.parametrize(("beta", "wanted"), [(5.0, 1.49), (10.0, 0.041), (15.0, 0.004), (20.0, 0.005), (30.0, 0.008)])
def test_distances_are_those_that_were_measured(beta, wanted):
    x = logits(10.0, rows=2000)
    assert l1(quantized_softmax(x, beta), x) == pytest.approx(wanted, rel=0.3)


@pytest.mark.parametrize("beta", [10.0, 20.0])
def test_the_largest_stays_the_largest_where_it_leads_by_a_step(beta):
    x = logits(10.0, rows=2000)
    top = x.topk(2).values
    leads = top[:, 0] - top[:, 1] > beta / 255
    assert leads.any()
    assert torch.equal(quantized_softmax(x, beta).argmax(-1)[leads], x.argmax(-1)[leads])


def test_a_shift_of_all_logits_changes_nothing():
    x = (logits(3.0) * 64).round() / 64
    torch.testing.assert_close(quantized_softmax(x + 1024, 20.0), quantized_softmax(x, 20.0), rtol=0, atol=0)


@pytest.mark.parametrize("entries", [None, (32, 32)])
def test_rows_sum_to_one_and_masked_places_are_zero(entries):
    x = logits(4.0).float()
    x[:, 50:] = -torch.inf
    x[0] = -torch.inf
    p = StableSoftmax.of(20.0, entries=entries)(x)
    torch.testing.assert_close(p[1:].sum(-1), torch.ones(len(x) - 1))
    assert (p[:, 50:] == 0).all() and (p[0] == 0).all() and (p >= 0).all()


def test_tables_cost_at_most_their_error_times_the_keys():
    """Every key's term is off by the tables' error at most, and the sum of terms is 1 or more: long rows pay for each of their keys."""
    for keys in (60, 600):
        x = logits(10.0, keys=keys)
        own, looked_up = (l1(StableSoftmax.of(20.0, entries=e)(x), x) for e in (None, (32, 32)))
        assert own < looked_up <= own + 2 * keys * 1.02 * build("exp", -20.0, 0.0).error


@pytest.mark.parametrize("entries", [None, (32, 32)])
def test_the_module_survives_a_checkpoint(entries):
    check_module(StableSoftmax.of(15.0, entries=entries), logits(5.0).float())


def test_the_observer_streams():
    check_observer(SoftmaxDistance(candidates=(5.0, 20.0)), groups=True)


def test_the_observer_ranks_the_candidates():
    seen = SoftmaxDistance()
    seen.update(logits(10.0).float())
    found = seen.result()
    assert int(found.argmin()) in (2, 3) and found[0] > 10 * found[3]  # 15 and 20, of 5, 10, 15, 20, 25, 30


def test_nonsense_is_refused_at_once():
    from qcore.errors import SpecError

    for wrong in ({"candidates": ()}, {"candidates": (0.0,)}, {"exp": "taylor"}, {"bits": 1}):
        with pytest.raises(SpecError):
            QANS(**wrong)
