"""The linear-memory algorithm against the dense one, and its guards."""

import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from qcore.errors import CalibrationError, NotFound, SpecError
from qplug_subsa import rows as rows_module
from qplug_subsa import subsa as subsa_module
from qplug_subsa.objective import GraphCut, greedy
from qplug_subsa.rows import NpyRows, as_rows, blocks
from qplug_subsa.subsa import SubSA
from qplug_subsa.units import Units, kernel


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks of a few rows, and no more than a few rows looked at one by one: every branch runs on a small pool."""
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 16 * 4 * 7)
    monkeypatch.setattr(subsa_module, "_FIRST", 3)
    monkeypatch.setattr(subsa_module, "_CHUNK", 5)
    init = subsa_module._Search.__init__

    def low_limit(self, *args):
        init(self, *args)
        self.limit = 2

    monkeypatch.setattr(subsa_module._Search, "__init__", low_limit)


@pytest.mark.parametrize("lam", [0.0, 0.01, "auto", 1.0, 2.0])
@pytest.mark.parametrize("centre", [True, False])
def test_it_chooses_what_the_dense_algorithm_chooses(points, lam, centre, tiny_blocks):
    x = np.concatenate([points, points[:40]])  # with copies
    found = SubSA(lam, centre).run(x, 60)
    dense = greedy(GraphCut(kernel(x, centre=centre), found.lam), 60)
    assert found.indices == dense.indices
    assert np.allclose(found.gains, dense.gains, atol=1e-8)


@pytest.mark.parametrize("lam", ["auto", 1.0])
def test_blocks_change_nothing(points, lam, request):
    whole = SubSA(lam).run(points, 50)
    request.getfixturevalue("tiny_blocks")
    assert SubSA(lam).run(points, 50).indices == whole.indices


def test_a_file_gives_what_the_array_gives(points, tmp_path, tiny_blocks):
    for dtype in (np.float16, np.float32, np.float64):
        np.save(tmp_path / "x.npy", points.astype(dtype))
        assert SubSA("auto").select(tmp_path / "x.npy", 30) == SubSA("auto").select(points.astype(dtype), 30)


def test_tensors_are_taken_as_they_are(points):
    plain = SubSA().select(points, 20)
    assert SubSA().select(torch.from_numpy(points), 20) == plain
    assert len(SubSA().select(torch.from_numpy(points).bfloat16(), 20)) == 20


def test_a_permuted_pool_gives_the_permuted_selection(points):
    order = np.random.default_rng(1).permutation(len(points))
    assert [int(order[i]) for i in SubSA("auto").select(points[order], 40)] == SubSA("auto").select(points, 40)


def test_scaling_and_rotating_the_embeddings_changes_nothing(points):
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(16, 16)))[0]
    assert SubSA("auto").select(7.5 * points.astype(np.float64) @ turn, 40) == SubSA("auto").select(points.astype(np.float64), 40)


def test_centring_changes_the_selection(points):
    assert SubSA(centre=True).select(points, 10) != SubSA(centre=False).select(points, 10)


def test_copies_are_chosen_in_the_order_of_the_pool(clustered):
    x = np.tile(clustered(50), (3, 1))
    for lam in (0.01, 1.0):
        place = {i: t for t, i in enumerate(SubSA(lam).select(x, 150))}
        assert all(place[i] < place[i + 50] < place[i + 100] for i in range(50))


def test_a_pool_of_one_text_over_and_over_is_taken_in_order():
    found = SubSA().run(np.ones((9, 4), np.float32) / 3, 5)
    assert found.indices == (0, 1, 2, 3, 4)
    assert found.gains == (4.5, 3.5, 2.5, 1.5, 0.5)  # K = ½ everywhere: λ·n/2 - |S|
    assert "9 embeddings equal the mean" in found.notes[0]


def test_a_vector_without_direction_is_half_like_everything(clustered):
    x = np.concatenate([clustered(20), np.zeros((1, 16), np.float32)])
    assert (kernel(x, centre=False)[20] == 0.5).all()
    found = SubSA(centre=False).run(x, 21)
    assert sorted(found.indices) == list(range(21)) and np.isfinite(found.gains).all()
    assert "1 embeddings equal the mean" in found.notes[0]


def test_on_a_skewed_pool_a_small_lambda_reaches_more_clusters():
    weights = [0.43] + [0.03] * 19
    rng = np.random.default_rng(0)
    owner = rng.choice(20, 1500, p=weights)
    x = (rng.normal(size=(20, 64))[owner] + 0.35 * rng.normal(size=(1500, 64))).astype(np.float32)
    reached = {lam: len(set(owner[SubSA(lam).select(x, 18)])) for lam in (1.0, "auto", 0.001)}
    assert reached[1.0] <= 2 < reached["auto"] <= reached[0.001]


def test_negative_gains_are_told(points):
    found = SubSA().run(points[:14], 14)
    first = next(i for i, g in enumerate(found.gains) if g < 0)
    assert f"from choice {first + 1} on gains are negative" in found.notes[-1]
    assert SubSA(2.0).run(points[:14], 14).notes == ()


def test_float32_bounds_are_never_below_the_value(clustered):
    """Also for embeddings with a mean a thousand times their spread, where float32 products are worthless."""
    for shift in (0.0, 1.0, 1000.0):
        x = clustered(300) + np.float32(shift)
        units = Units.of(as_rows(x))
        for seed in range(5):
            q = np.random.default_rng(seed).normal(size=16) * 10.0**seed
            above, exact = units.dot_above(q), units.dot(q)
            assert (above >= exact).all()
            assert shift > 1 or (above - exact).max() < 1e-3 * np.linalg.norm(q)


def test_memory_does_not_grow_with_the_square(tmp_path, clustered):
    peaks = {}
    for n in (4000, 16000):
        np.save(tmp_path / "x.npy", clustered(n, 32))
        tracemalloc.start()
        SubSA("auto").select(tmp_path / "x.npy", 20)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[16000] < 16000 * 16000 / 16  # an n × n array of single bits would be larger
    assert peaks[16000] < 4.5 * peaks[4000]


class Blocked(GraphCut):
    """Graph cut over a kernel that is computed block by block and row by row: the dense algorithm where n² numbers do not fit."""

    def __init__(self, x, lam):
        self.e, self.lam = Units.of(as_rows(x)).block(0, len(x)), lam
        self.column = np.concatenate([(0.5 + 0.5 * self.e[i : i + 500] @ self.e.T).sum(1) for i in range(0, len(x), 500)])
        self.penalty = np.zeros(len(x))

    @property
    def n(self):
        return len(self.e)

    def add(self, index):
        self.penalty += 0.5 + 0.5 * self.e @ self.e[index]


@pytest.mark.parametrize("n", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_large_pool_gives_the_dense_choices(n, clustered, tmp_path):
    x = clustered(n, 384, 50, spread=1.5)
    np.save(tmp_path / "x.npy", x)
    for lam in ("auto", 1.0):
        found = SubSA(lam).run(tmp_path / "x.npy", 100)
        assert found.indices == greedy(Blocked(x, found.lam), 100).indices


def test_three_thousand_texts_take_milliseconds(clustered):
    """About 20 ms on one core; processor time, the least of three, with a wide margin for slow machines."""
    x = clustered(3000, 384, 30)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        SubSA("auto").select(x, 100)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.5


def test_selection_needs_no_torch(tmp_path, clustered):
    np.save(tmp_path / "x.npy", clustered(50))
    code = f"import sys; from qplug_subsa.subsa import SubSA; SubSA().select({str(tmp_path / 'x.npy')!r}, 5); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_wrong_with_embeddings_is_named(points, tmp_path):
    for bad in (np.nan, np.inf):
        x = points.copy()
        x[117, 3] = bad
        with pytest.raises(CalibrationError, match="row 117"):
            SubSA().select(x, 5)
    with pytest.raises(SpecError, match="shape"):
        SubSA().select(points[0], 5)
    with pytest.raises(SpecError, match="lam"):
        SubSA(-1.0)
    with pytest.raises(NotFound, match=r"gone\.npy"):
        SubSA().select(tmp_path / "gone.npy", 5)
    (tmp_path / "text.npy").write_text("not numbers")
    with pytest.raises(CalibrationError, match=r"no \.npy file"):
        NpyRows(tmp_path / "text.npy")
    np.save(tmp_path / "flat.npy", np.zeros(5))
    with pytest.raises(CalibrationError, match=r"shape \(5,\)"):
        NpyRows(tmp_path / "flat.npy")
    np.save(tmp_path / "cut.npy", points)
    whole = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-100])
    with pytest.raises(CalibrationError, match="cut off"):
        NpyRows(tmp_path / "cut.npy")
    for k in (0, 241):
        with pytest.raises(SpecError, match="budget"):
            SubSA().select(points, k)


def test_blocks_cover_all_rows_once(points, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 16 * 4 * 7)
    seen = [(start, len(block)) for start, block in blocks(as_rows(points))]
    assert seen[0] == (0, 7) and sum(count for _, count in seen) == 240
    assert all(b[0] == a[0] + a[1] for a, b in pairwise(seen))
