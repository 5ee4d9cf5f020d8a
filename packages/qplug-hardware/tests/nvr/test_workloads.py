"""The traces of sparse programs are what those programs gather."""

import numpy as np
import pytest
from qcore.errors import SpecError
from qplug_hardware.nvr.config import CacheShape, Indirect, Machine, Runahead, Settings, Stream
from qplug_hardware.nvr.models import MODELS, simulate
from qplug_hardware.nvr.synth import SYNTHETIC, uniform, zipf
from qplug_hardware.nvr.trace import Layout, Trace, spans
from qplug_hardware.nvr.workloads import csc, csr, kv_pages, kv_rows, moe_routing, neighbours, point_cloud, power_law_graph, route


def random_csr(rng, rows, columns, density=0.2):
    dense = rng.integers(1, 9, size=(rows, columns)) * (rng.random((rows, columns)) < density)
    r, c = np.nonzero(dense)
    return dense, np.concatenate([[0], np.cumsum((dense != 0).sum(1))]), c, dense[r, c]


@pytest.mark.parametrize("model", MODELS)
def test_a_product_from_gathered_rows_is_the_product(model):
    """Prefetching changes no result: A·B is summed from the rows that the simulated program gathered."""
    rng = np.random.default_rng(3)
    dense, row_ptr, col_idx, values = random_csr(rng, 20, 30)
    b = rng.integers(-5, 5, size=(30, 4))
    gathered = simulate(csr(row_ptr, col_idx, 30, 32), model).gathered
    out = np.zeros((20, 4), int)
    np.add.at(out, np.repeat(np.arange(20), np.diff(row_ptr)), values[:, None] * b[gathered])
    assert np.array_equal(out, dense @ b)


def test_rows_in_another_order_and_some_left_out():
    trace = csr([0, 2, 2, 5], [7, 1, 0, 3, 9], 10, 64, order=[2, 0, 1])
    assert trace.targets.tolist() == [0, 3, 9, 7, 1]
    assert trace.loops.tolist() == [[2, 5], [0, 2]]


def test_columns_gather_rows_of_the_result():
    assert csc([0, 1, 3], [4, 0, 2], 5, 64).targets.tolist() == [4, 0, 2]


def test_experts_gather_the_tokens_that_chose_them():
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4], [0.2, 0.3, 0.5]])
    chosen = route(scores, 2)
    assert chosen.tolist() == [[1, 2], [0, 2], [2, 1]]
    trace = moe_routing(chosen, 3, 64)
    assert trace.targets.tolist() == [1, 0, 2, 0, 1, 2]  # expert 0: token 1; expert 1: tokens 0 and 2; expert 2: all
    assert trace.loops.tolist() == [[0, 1], [1, 3], [3, 6]]
    assert moe_routing([[0, -1], [-1, 1]], 3, 64).targets.tolist() == [0, 1]


def test_caches_are_read_query_by_query_and_page_by_page():
    assert kv_rows([[3, 1], [-1, 2]], 4, 64).targets.tolist() == [3, 1, 2]
    paged = kv_pages([[1, 0], [2, -1]], [5, 3, 9], 10, 64)
    assert paged.targets.tolist() == [3, 5, 9] and len(paged.tables) == 1


def test_holes_of_a_neighbour_map_are_not_visited():
    trace = neighbours([[-1, 2, 1], [-1, -1, -1], [0, -1, -1]], 3, 64)
    assert trace.targets.tolist() == [2, 1, 0]
    assert trace.loops.tolist() == [[0, 2], [6, 7]]  # the table lies in memory as it was, with room for three a row


def test_neighbours_of_a_point_cloud_are_near_and_mutual_where_they_should_be():
    found = point_cloud(200, 8, seed=0)
    assert found.shape == (200, 8) and (found >= -1).all() and (found < 200).all() and (found != np.arange(200)[:, None]).all()
    assert (found == -1).any() and (found >= 0).mean() > 0.5
    pairs = {(i, j) for i, row in enumerate(found.tolist()) for j in row if j >= 0}
    assert sum((j, i) in pairs for i, j in pairs) > 0.6 * len(pairs)  # of random pairs 4 % would be


def test_popular_nodes_have_many_neighbours():
    row_ptr, col_idx = power_law_graph(300, 4000, seed=0)
    assert row_ptr[-1] == len(col_idx) == 4000
    weight = np.arange(1, 301) ** -0.8
    share = np.sort(np.diff(row_ptr))[::-1][:30].sum() / 4000
    assert share == pytest.approx(weight[:30].sum() / weight.sum(), abs=0.03)  # four standard errors, √(¼ / 4000) each


def test_zipf_has_its_exponent():
    trace = zipf(1000, 40_000, exponent=1.2)
    counts = np.sort(np.bincount(trace.targets, minlength=1000))[::-1]
    expected = 40_000 * np.arange(1, 6) ** -1.2 / (np.arange(1, 1001) ** -1.2).sum()
    assert (np.abs(counts[:5] - expected) < 4 * np.sqrt(expected)).all()  # four standard errors


def test_vectors_end_where_loops_end():
    assert spans([(0, 20), (30, 35)], 16) == [(0, 16), (16, 20), (20, 25)]


def test_arrays_do_not_share_pages():
    trace = Trace("x", [0, 1], 3, 100, ([2, 0], [1, 2, 0]), value_bytes=2)
    at = Layout.of(trace)
    bases = [at.index, at.value, *at.tables, at.data]
    assert bases == sorted(set(bases)) and all(b % 4096 == 0 for b in bases) and len(bases) == 5


def test_a_head_is_the_beginning():
    for name, make in SYNTHETIC.items():
        trace = make(50, 90, 128, 0)
        part = trace.head(37)
        assert part.gathers == 37 and part.targets.tolist() == trace.targets[:37].tolist(), name
    assert trace.head(10**6).gathers == 90


WRONG = [
    (lambda: Trace("x", [0, 5], 5, 64), r"indices\[1\] is 5; allowed: 0 to 4"),
    (lambda: Trace("x", [0, -1], 5, 64), r"indices\[1\] is -1"),
    (lambda: Trace("x", [0], 5, 64, ([9],)), r"tables\[0\]\[0\] is 9; allowed: 0 to 4"),
    (lambda: Trace("x", [1], 5, 64, ([0],)), r"indices\[0\] is 1; allowed: 0 to 0, the rows of table 0"),
    (lambda: Trace("x", [], 5, 64), "float64"),
    (lambda: Trace("x", np.array([], int), 5, 64), "no indices"),
    (lambda: Trace("x", [0.5], 5, 64), "allowed: integers with 1 dimension"),
    (lambda: Trace("x", [0], 0, 64), "rows is 0; allowed: an integer of at least 1"),
    (lambda: Trace("x", [0], 5, 64, index_bytes=3), "index_bytes is 3; allowed: 1, 2, 4 or 8"),
    (lambda: Trace("x", [0], 5, 64, bounds=[[0, 2]]), "loop 0 goes from 0 to 2; allowed: 0 ≤ first ≤ end ≤ 1"),
    (lambda: Trace("x", [0], 5, 64, bounds=[[1, 1]]), "visits no element"),
    (lambda: Trace("x", np.array([2**63], np.uint64), 5, 64), "63 bits"),
    (lambda: csr([0, 2, 1], [0], 5, 64), "row_ptr"),
    (lambda: csr([0, 3, 2, 4], [0, 0, 0, 0], 5, 64), r"row_ptr\[2\] is 2, less than 3"),
    (lambda: csr([0, 1], [0], 5, 64, order=[1]), "rows from 0 to 0"),
    (lambda: moe_routing([[3]], 3, 64), r"chosen\[0, 0\] is 3"),
    (lambda: route(np.zeros((2, 3)), 4), "k is 4; allowed: an integer from 1 to 3"),
    (lambda: uniform(0, 5), "count is 0"),
    (lambda: zipf(5, 5, exponent=float("nan")), "exponent is nan"),
    (lambda: Machine(line=48), "machine.line is 48; allowed: a power of two"),
    (lambda: Machine(l2=CacheShape(size=1000, ways=8, latency=1)), r"l2.size is 1000; allowed: a multiple of ways × line = 8 × 64 = 512"),
    (lambda: Settings(nsb=CacheShape(size=100, ways=1, latency=1)), "nsb.size is 100"),
    (lambda: Machine(mshrs=0), "machine.mshrs is 0; allowed: an integer of at least 1"),
    (lambda: Machine(mshrs=True), "machine.mshrs is True"),
    (lambda: Runahead(depth=-1), "runahead.depth is -1"),
    (lambda: Runahead(sd=1), "runahead.sd is 1; allowed: true or false"),
    (lambda: Stream(distance=0), "stream.distance is 0"),
    (lambda: Indirect(confirmations=0), "imp.confirmations is 0"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[m[:30] for _, m in WRONG])
def test_what_cannot_be_is_refused_with_name_value_and_what_is_allowed(make, message):
    with pytest.raises(SpecError, match=message):
        make()
