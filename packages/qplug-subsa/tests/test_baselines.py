"""Baselines against their definitions, written out plainly."""

import numpy as np
import pytest
from qcore.errors import CalibrationError, SpecError
from qcore.testing import check_selector
from qplug_subsa import qcore_selectors
from qplug_subsa import rows as rows_module
from qplug_subsa.baselines import Diversity, KMeans, LeastConfidence, Random
from qplug_subsa.coverage import coverage, nearest_chosen, nearest_similarity, random_coverage
from qplug_subsa.facility import FacilityLocation
from qplug_subsa.ideal import IDEAL
from qplug_subsa.neighbours import nearest
from qplug_subsa.objective import greedy
from qplug_subsa.rows import as_rows
from qplug_subsa.subsa import SubSA
from qplug_subsa.units import Units, kernel
from qplug_subsa.votek import FastVoteK

ALL = [cls() for cls in qcore_selectors()]


@pytest.mark.parametrize("selector", ALL, ids=lambda s: s.name)
def test_it_is_a_selector(selector):
    check_selector(selector)


@pytest.mark.parametrize("selector", ALL, ids=lambda s: s.name)
def test_copies_budgets_and_single_texts(selector, points):
    copies = np.ones((12, 4), np.float32)
    assert sorted(selector.select(copies, 12, scores=np.zeros(12))) == list(range(12))
    assert selector.select(copies[:1], 1, scores=np.zeros(1)) == [0]
    for k in (0, 13):
        with pytest.raises(SpecError, match="budget"):
            selector.select(copies, k, scores=np.zeros(12))


def cosines(x: np.ndarray, centre: bool) -> np.ndarray:
    return 2 * kernel(x, centre=centre) - 1


def test_nearest_leaves_each_row_out_and_orders_the_others(points):
    x = np.concatenate([points[:60], points[:20]])
    indices, values = nearest(Units.of(as_rows(x), centre=False), 7)
    c = cosines(x, False)
    for i in range(80):
        others = sorted((j for j in range(80) if j != i), key=lambda j: (-round(c[i, j], 9), j))
        assert list(indices[i]) == others[:7]
        assert np.allclose(values[i], c[i, others[:7]], atol=1e-9)
    assert nearest(Units.of(as_rows(x[:3]), centre=False), 150)[0].shape == (3, 2)


def test_votek_follows_its_formula(points):
    x = points[:90]
    votes = [set(row) for row in nearest(Units.of(as_rows(x), centre=False), 12)[0].tolist()]
    chosen: list[int] = []
    for _ in range(15):
        scores = [
            -1.0 if u in chosen else sum(10.0 ** -len(votes[v] & set(chosen)) for v in range(90) if u in votes[v] and v not in chosen)
            for u in range(90)
        ]
        chosen.append(int(np.argmax(np.round(scores, 9))))
    assert FastVoteK(k=12).select(x, 15) == chosen


def test_diversity_takes_the_smallest_summed_cosine(points):
    x = points[:80]
    c = cosines(x, False)
    chosen = Diversity(seed=3).select(x, 12)
    for t in range(1, 12):
        summed = c[:, chosen[:t]].sum(1)
        summed[chosen[:t]] = np.inf
        assert chosen[t] == int(summed.argmin())


def test_facility_location_is_greedy_on_the_whole_kernel(points):
    x = points[:100]
    K = kernel(x)
    best, chosen = np.zeros(100), []
    for _ in range(20):
        gains = np.maximum(K - best, 0).sum(1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        best = np.maximum(best, K[chosen[-1]])
    assert FacilityLocation().select(x, 20) == chosen


def test_ideals_influence_is_the_size_of_what_a_cascade_reaches(points):
    influence = IDEAL(k=4, draws=3, seed=5).influence(Units.of(as_rows(points[:40]), centre=False))

    def reach(start: set[int], draw: int) -> set[int]:
        offsets, targets = influence.live[draw]
        seen, new = set(start), set(start)
        while new:
            new = {int(w) for v in new for w in targets[offsets[v] : offsets[v + 1]]} - seen
            seen |= new
        return seen

    found = greedy(influence, 6)
    assert found.value == pytest.approx(np.mean([len(reach(set(found.indices), d)) for d in range(3)]))
    first = [np.mean([len(reach({v}, d)) for d in range(3)]) for v in range(40)]
    assert found.gains[0] == pytest.approx(max(first))
    assert IDEAL(k=4, draws=3, seed=5).select(points[:40], 6) == list(found.indices)
    assert IDEAL(k=4, draws=3, seed=6).select(points[:40], 6) != list(found.indices)


def test_live_edges_follow_the_cosines():
    """One neighbour: its share is 1, so every edge is live in every draw."""
    influence = IDEAL(k=1, draws=4).influence(Units.of(as_rows(np.eye(6) + 1), centre=False))
    assert all(len(targets) == 6 for _, targets in influence.live)


def test_least_confidence_reads_scores_alone(points):
    scores = np.linspace(1, 0, 240)
    assert LeastConfidence().select(points, 3, scores) == [239, 238, 237]
    assert LeastConfidence().select(points, 2, np.zeros(240)) == [0, 1]
    for bad in (None, np.zeros(3), np.full(240, np.nan)):
        with pytest.raises(CalibrationError, match="confidence"):
            LeastConfidence().select(points, 3, bad)


def test_kmeans_finds_separate_clusters():
    rng = np.random.default_rng(0)
    owner = rng.choice(5, 300, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    x = (rng.normal(size=(5, 32))[owner] + 0.1 * rng.normal(size=(300, 32))).astype(np.float32)
    for seed in range(5):
        assert [int(owner[i]) for i in KMeans(seed).select(x, 5)] == [0, 1, 2, 3, 4]  # largest first


def test_seeds_matter_where_there_are_seeds(points):
    for cls in (Random, Diversity):
        assert cls(seed=0).select(points, 10) == cls(seed=0).select(points, 10) != cls(seed=1).select(points, 10)


def test_coverage_is_what_it_says(points):
    units = Units.of(as_rows(points))
    c = cosines(points, True)
    chosen = SubSA().select(points, 9)
    best = nearest_similarity(units, chosen)
    assert np.allclose(best, c[:, chosen].max(1))
    _, which, curve = nearest_chosen(units, chosen)
    assert which.tolist() == c[:, chosen].argmax(1).tolist()
    assert np.allclose(curve, [c[:, chosen[: t + 1]].max(1).mean() for t in range(9)])
    found = coverage(units, chosen)
    assert found.nearest == pytest.approx(best.mean())
    inner = c[np.ix_(chosen, chosen)]
    assert found.redundancy == pytest.approx(inner[~np.eye(9, dtype=bool)].mean())
    assert coverage(units, range(240)).nearest == pytest.approx(1.0)
    assert coverage(units, [3]).redundancy == 0.0


def test_coverage_is_the_same_in_blocks(points, monkeypatch):
    units, chosen = Units.of(as_rows(points)), list(range(0, 240, 7))
    whole = nearest_chosen(units, chosen)
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 16 * 4 * 11)
    assert all(np.allclose(a, b) for a, b in zip(nearest_chosen(units, chosen), whole, strict=True))


def test_facility_location_covers_best(points):
    units = Units.of(as_rows(points))
    covered = {s.name: coverage(units, s.select(points, 12, np.arange(240.0))).nearest for s in ALL}
    assert max(covered, key=covered.get) == "facility-location"
    assert covered["facility-location"] > random_coverage(units, 12).nearest + 0.05
