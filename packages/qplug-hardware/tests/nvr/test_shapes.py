"""How the models compare: the shapes that the method's description promises, on small traces."""

from dataclasses import replace

import numpy as np
import pytest
from qplug_hardware.nvr.config import CacheShape, Machine, Runahead, Settings
from qplug_hardware.nvr.models import compare
from qplug_hardware.nvr.run import sweep
from qplug_hardware.nvr.synth import permutation, short_rows, streaming, two_level, zipf
from qplug_hardware.nvr.trace import Trace

SMALL = Machine(l2=CacheShape(size=16 << 10, ways=8, latency=20))
ROOMY = Machine(compute=400)  # arithmetic that leaves the bus idle, so that coverage shows the mechanism


@pytest.fixture(scope="module")
def curve():
    """Speedup and result by depth, on a Zipf trace whose rows are eight times the cache."""
    swept = sweep(zipf(1000, 2400), ["nvr"], (4, 16, 64, 256, 1024), Settings(machine=SMALL))
    return swept["nvr"]


def test_speedup_rises_then_falls_with_depth(curve):
    speedups = [r.speedup for r in curve.values()]
    best = int(np.argmax(speedups))
    assert 0 < best < len(speedups) - 1
    assert speedups[: best + 1] == sorted(speedups[: best + 1]) and speedups[best:] == sorted(speedups[best:], reverse=True)
    assert speedups[0] > 1.1 and speedups[best] > 2 * speedups[0] and speedups[-1] < 0.8 * speedups[best]


def test_deep_runahead_falls_because_it_pollutes(curve):
    assert curve[1024].evicted_unused > curve[64].evicted_unused
    assert curve[1024].offchip_bytes > 1.1 * curve[64].offchip_bytes
    assert curve[1024].coverage_with_late < curve[64].coverage_with_late


def test_late_prefetches_are_what_shallow_runahead_gives(curve):
    shallow, deep = curve[16], curve[64]
    # counted as covered, the shallow one looks better; but its loads still wait
    assert shallow.coverage_with_late > deep.coverage_with_late > 0.9
    assert shallow.coverage < 0.5 * deep.coverage and shallow.timeliness < 0.5 * deep.timeliness and shallow.cycles > deep.cycles


@pytest.mark.parametrize("make", [streaming, permutation])
def test_speedup_saturates_at_the_bus(make):
    found = compare(make(4000, 1600), ["nvr"])["nvr"]
    # nothing is reused: past the first vector the bus is never idle
    assert found.bus_bound <= found.cycles <= 1.03 * found.bus_bound


def test_streaming_gains_what_a_stream_prefetcher_gives():
    found = compare(streaming(4000, 1600), ["stream", "nvr"])
    assert found["nvr"].speedup > 2
    assert found["stream"].speedup == pytest.approx(found["nvr"].speedup, rel=0.05)


def test_one_level_of_a_random_permutation_is_imps_ground():
    found = compare(permutation(3000, 2000, 64), ["stream", "imp", "nvr"], Settings(machine=ROOMY, runahead=Runahead(depth=64)))
    assert found["nvr"].coverage > 0.95
    assert found["imp"].coverage == pytest.approx(found["nvr"].coverage, abs=0.08)  # IMP needs some vectors until its streams are confirmed
    assert found["stream"].coverage < 0.1


def test_two_levels_are_beyond_imp():
    found = compare(two_level(3000, 2000, 64), ["imp", "nvr"], Settings(machine=ROOMY, runahead=Runahead(depth=64)))
    rows = {m: r.by_stage["rows"] for m, r in found.items()}
    assert found["nvr"].coverage > 0.95 and found["imp"].coverage < 0.5
    assert rows["imp"]["timely"] + rows["imp"]["late"] == 0
    assert found["nvr"].speedup > 1.5 * found["imp"].speedup


def test_without_loop_bounds_short_rows_cost_accuracy_coverage_and_traffic():
    trace = short_rows(20_000, 1200)  # far more rows than L2 holds: what is fetched in error is of no use later
    on = compare(trace, ["nvr"])["nvr"]
    off = compare(trace, ["nvr"], Settings(runahead=Runahead(lbd=False)))["nvr"]
    assert on.accuracy > 0.99 and off.accuracy < 0.5
    assert off.coverage_with_late < 0.6 * on.coverage_with_late and off.offchip_bytes > 2 * on.offchip_bytes


def test_without_loop_bounds_nothing_is_lost_where_loops_follow_one_another():
    """What lies behind a row's end is the next row then: only the end of the array is overrun."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 12, size=150))
    trace = Trace("dense-csr", rng.integers(3000, size=ends[-1]), 3000, 128, bounds=np.stack([np.append(0, ends[:-1]), ends], 1))
    on = compare(trace, ["nvr"])["nvr"]
    off = compare(trace, ["nvr"], Settings(runahead=Runahead(lbd=False)))["nvr"]
    assert off.coverage_with_late > 0.97 * on.coverage_with_late and off.accuracy > 0.98


@pytest.mark.parametrize("unit", ["sd", "scd"])
def test_without_a_detector_coverage_collapses(unit):
    trace = two_level(3000, 1200)
    whole = compare(trace, ["nvr"])["nvr"]
    part = compare(trace, ["nvr"], Settings(runahead=replace(Runahead(), **{unit: False})))["nvr"]
    assert whole.coverage_with_late > 0.8 and part.coverage_with_late < 0.1


def test_without_vector_steps_a_dependent_chain_is_slower():
    one = Settings(machine=Machine(bus_cycles=1), runahead=Runahead(chains=2))
    trace = two_level(3000, 1200, 64)
    whole = compare(trace, ["nvr"], one)["nvr"]
    part = compare(trace, ["nvr"], replace(one, runahead=replace(one.runahead, vmig=False)))["nvr"]
    assert whole.speedup > 1.5 * part.speedup


def test_runahead_that_waits_for_stalls_does_less():
    found = compare(zipf(3000, 2400), ["dvr", "nvr"])
    assert 1 < found["dvr"].speedup < 0.9 * found["nvr"].speedup


def test_next_line_covers_half_of_pairs_and_gains_nothing_on_gathers():
    # two lines a row, and one vector: the index line is one miss, whatever is done
    trace = permutation(2000, 16)
    found = compare(trace, ["none", "next-line"], Settings(machine=Machine(mshrs=64)))
    assert found["next-line"].by_stage["rows"] == {"hit": 0, "timely": 0, "late": 16, "cold": 16, "again": 0}
    assert found["next-line"].coverage == 0 and found["next-line"].coverage_with_late == pytest.approx(16 / 33)
    assert found["next-line"].cycles == pytest.approx(found["none"].cycles, rel=0.02)  # one useless prefetch, of the index line behind


def test_the_buffer_serves_quicker_and_fetches_no_more():
    found = compare(zipf(1000, 2400), ["nvr", "nvr-nsb"], Settings(machine=SMALL))
    assert found["nvr-nsb"].cycles < found["nvr"].cycles
    assert found["nvr-nsb"].offchip_bytes <= found["nvr"].offchip_bytes


def test_the_area_proxy_counts_what_is_switched_on():
    trace = streaming(100, 32)
    whole = compare(trace, ["none", "dvr", "nvr", "nvr-nsb", "oracle"])
    assert whole["none"].area["sum"] == whole["oracle"].area["sum"] == 0
    parts = whole["nvr"].area
    assert parts["sum"] == sum(parts[u] for u in ("sd", "scd", "lbd", "vmig"))
    assert parts["vmig"] == 8 * 16 * 48 and whole["dvr"].area["chains"] == 8 * 48
    assert whole["nvr-nsb"].area["nsb"] == 256 * (512 + 48)
    for unit in ("sd", "scd", "lbd"):
        less = compare(trace, ["nvr"], Settings(runahead=replace(Runahead(), **{unit: False})))["nvr"].area
        assert less["sum"] == parts["sum"] - parts[unit]
