"""Laws of allocation: the budget holds, the exact one is never worse than any other, order does not matter."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qcore.solvers import knapsack as module
from qcore.solvers.knapsack import greedy, knapsack, prefix, smallest, threshold, total

item = st.lists(st.tuples(st.floats(0, 100, width=32), st.integers(1, 60)), min_size=1, max_size=4)
problem = st.tuples(st.lists(item, min_size=1, max_size=7), st.floats(0, 1))


def laid_out(drawn):
    items, share = drawn
    scores = [[s for s, _ in own] for own in items]
    costs = [[c for _, c in own] for own in items]
    least, most = smallest(costs), sum(max(c) for c in costs)
    return scores, costs, round(least + share * (most - least))


@settings(max_examples=200, deadline=None)
@given(problem)
def test_the_budget_holds_and_the_exact_allocation_is_the_best(drawn):
    scores, costs, budget = laid_out(drawn)
    exact = knapsack(scores, costs, budget)
    for found in (exact, greedy(scores, costs, budget), prefix(scores, costs, budget)):
        assert total(costs, found) <= budget
        assert total(scores, exact) <= total(scores, found) + 1e-9
    if len(costs) <= 5:
        every = itertools.product(*(range(len(c)) for c in costs))
        best = min(total(scores, e) for e in every if total(costs, e) <= budget)
        assert total(scores, exact) == pytest.approx(best, rel=1e-9, abs=1e-9)


def layers(count: int, seed: int):
    """Scores that fall with the bits, costs of 2, 3, 4 and 8 bits of layers of different size."""
    g = random.Random(seed)
    scores, costs = [], []
    for _ in range(count):
        size, damage = g.choice([576 * 576, 192 * 576, 1536 * 576]), g.lognormvariate(0, 1.5)
        scores.append([damage * 4.0**-b * g.uniform(0.7, 1.4) for b in (2, 3, 4, 8)])
        costs.append([size * b // 8 + size // 32 for b in (2, 3, 4, 8)])
    return scores, costs, round(3.4 / 8 * sum(c[0] * 8 / 2.25 for c in costs))


@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_layers_are_allocated_exactly_and_in_any_order(seed):
    scores, costs, budget = layers(200, seed)
    found = knapsack(scores, costs, budget)
    assert total(costs, found) <= budget and total(scores, found) <= total(scores, greedy(scores, costs, budget))
    order = list(range(200))
    random.Random(seed).shuffle(order)
    again = knapsack([scores[i] for i in order], [costs[i] for i in order], budget)
    assert [found[i] for i in order] == again


def test_too_many_states_still_beat_greedy(monkeypatch):
    monkeypatch.setattr(module, "_MOST_STATES", 50)
    scores, costs, budget = layers(40, 0)
    found = knapsack(scores, costs, budget)
    assert total(costs, found) <= budget and total(scores, found) <= total(scores, greedy(scores, costs, budget))


def test_prefix_lowers_the_least_sensitive_first_and_no_more_than_it_must():
    scores, costs = [[9, 0], [1, 0], [5, 0]], [[2, 8], [2, 8], [2, 8]]
    assert prefix(scores, costs, 24) == [1, 1, 1]
    assert prefix(scores, costs, 18) == [1, 0, 1]
    assert prefix(scores, costs, 12) == [1, 0, 0]


def test_a_threshold_keeps_what_exceeds_it():
    scores, costs = [[9, 0], [1, 0], [5, 0]], [[2, 8], [2, 8], [2, 8]]
    assert threshold(scores, costs, 18, 4) == [1, 0, 1]
    with pytest.raises(SpecError, match="keeps 2 of 3 weights"):
        threshold(scores, costs, 17, 4)


@pytest.mark.parametrize("allocate", [knapsack, greedy, prefix])
def test_a_budget_below_the_smallest_choice_is_refused(allocate):
    with pytest.raises(SpecError, match="below the smallest choice, 4 bytes"):
        allocate([[1, 0], [1, 0]], [[2, 8], [2, 8]], 3)
