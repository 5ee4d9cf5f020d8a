"""Laws of the objective, brute force on small pools, and variants that must be told apart from it."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qplug_subsa.facility import FacilityLocationObjective
from qplug_subsa.objective import GraphCut, greedy, lazy_greedy
from qplug_subsa.rows import MemoryRows
from qplug_subsa.units import Units, kernel


def pool(n: int, seed: int, d: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + rng.integers(0, 3, (n, 1))
    x[n // 2] = x[0]  # a copy
    return x


def random_sets(n: int, seed: int, count: int = 60):
    """(S, T ⊇ S, e ∉ T)"""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        order = rng.permutation(n)
        small, large = sorted(rng.integers(0, n, 2))
        yield list(order[:small]), list(order[:large]), int(order[-1])


def gain_of(K: np.ndarray, lam: float, chosen: list[int], e: int) -> float:
    objective = GraphCut(K, lam)
    for s in chosen:
        objective.add(s)
    return float(objective.gains(np.array([e]))[0])


def identity_error(K: np.ndarray, lam: float, gain, seed: int) -> float:
    """Largest |F(S + e) - F(S) - gain(e | S)| over random sets."""
    f = GraphCut(K, lam).value
    return max(abs(f([*t, e]) - f(t) - gain(K, lam, t, e)) for _, t, e in random_sets(len(K), seed))


def submodularity_violations(K: np.ndarray, lam: float, seed: int) -> int:
    return sum(gain_of(K, lam, s, e) < gain_of(K, lam, t, e) - 1e-9 for s, t, e in random_sets(len(K), seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 20), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0, 2.0]))
def test_a_gain_is_the_difference_of_two_values(n, seed, lam):
    assert identity_error(kernel(pool(n, seed)), lam, gain_of, seed) < 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 20), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0, 2.0]))
def test_gains_never_grow(n, seed, lam):
    assert submodularity_violations(kernel(pool(n, seed)), lam, seed) == 0


def test_no_triple_of_nested_sets_violates_submodularity_on_twelve_points():
    K = kernel(pool(12, 3))
    inside = {s: K[list(s)].sum(0) for r in range(5) for s in combinations(range(12), r)}  # Σ_{s∈S} K_se for every e
    checked = 0
    for s, penalty in inside.items():
        for e in set(range(12)) - set(s):
            more = inside.get(tuple(sorted((*s, e))))
            if more is not None:
                # gain(f | S) ≥ gain(f | S + e) for every f: adding one element at a time covers all nested pairs
                assert (penalty <= more + 1e-12).all()
                checked += 1
    assert checked == 12 + 66 * 2 + 220 * 3 + 495 * 4


def penalty_once(K, lam, chosen, e):
    return lam * K[:, e].sum() - K[chosen][:, e].sum()


def without_itself(K, lam, chosen, e):
    return gain_of(K, lam, chosen, e) - lam * K[e, e]


@pytest.mark.parametrize("wrong", [penalty_once, without_itself])
def test_wrong_gains_break_the_identity(wrong):
    assert identity_error(kernel(pool(14, 1)), 1.0, wrong, 1) > 0.1


def test_a_bare_cosine_is_not_submodular():
    assert submodularity_violations(2 * kernel(pool(14, 1)) - 1, 1.0, 1) > 0


def test_lambda_two_is_monotone_and_lambda_one_is_not():
    """n = 14: at λ = 1 the gains turn negative, at λ = 2 never."""
    for seed in range(10):
        K = kernel(pool(14, seed))
        assert min(greedy(GraphCut(K, 2.0), 14).gains) >= -1e-9
    assert min(greedy(GraphCut(K, 1.0), 14).gains) < 0


@pytest.mark.parametrize("lam", [1.0, 2.0])
def test_greedy_reaches_its_bound_of_the_optimum(lam):
    """(1 - 1/e)·OPT where gains stay positive; in fact at least 0.98 of it on these pools."""
    ratios = []
    for seed in range(15):
        K = kernel(pool(12, seed))
        found = greedy(GraphCut(K, lam), 4)
        assert min(found.gains) > 0
        f = GraphCut(K, lam).value
        ratios.append(f(found.indices) / max(f(s) for s in combinations(range(12), 4)))
    assert min(ratios) >= 1 - 1 / np.e
    assert min(ratios) > 0.97 and max(ratios) <= 1 + 1e-12


def test_the_value_is_the_sum_of_the_gains():
    K = kernel(pool(30, 5))
    found = greedy(GraphCut(K, 1.0), 12)
    assert found.value == pytest.approx(GraphCut(K, 1.0).value(found.indices), abs=1e-9)


def test_a_copy_of_a_chosen_text_loses_two():
    K = kernel(pool(14, 2))
    assert gain_of(K, 1.0, [0], 7) == pytest.approx(gain_of(K, 1.0, [], 7) - 2, abs=1e-12)
    assert gain_of(K, 1.0, [], 7) == pytest.approx(gain_of(K, 1.0, [], 0), abs=1e-12)


OBJECTIVES = {
    "graph cut, 1": lambda x: GraphCut(kernel(x), 1.0),
    "graph cut, 0.05": lambda x: GraphCut(kernel(x), 0.05),
    "facility location": lambda x: FacilityLocationObjective(Units.of(MemoryRows(x))),
}


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_lazy_greedy_chooses_what_greedy_chooses_and_computes_less(make, seed):
    x = np.concatenate([pool(150, seed, 8), pool(50, seed, 8)])  # 50 copies
    plain, lazy = greedy(make(x), 40), lazy_greedy(make(x), 40, batch=4)
    assert lazy.indices == plain.indices
    assert np.allclose(lazy.gains, plain.gains, atol=1e-9)
    assert lazy.evaluated < plain.evaluated


def test_the_first_gains_alone_do_not_order_the_choices():
    """A "lazy" greedy that never looks again."""
    K = kernel(pool(60, 0))
    objective = GraphCut(K, 0.05)
    once = tuple(int(i) for i in np.argsort(-objective.gains(np.arange(60)))[:10])
    assert once != greedy(objective, 10).indices


@pytest.mark.parametrize(("k", "message"), [(0, "chooses nothing"), (-3, "chooses nothing"), (15, "more than the pool's 14 texts")])
def test_budgets_that_cannot_be_met(k, message):
    for search in (greedy, lazy_greedy):
        with pytest.raises(SpecError, match=message):
            search(GraphCut(kernel(pool(14, 0))), k)
