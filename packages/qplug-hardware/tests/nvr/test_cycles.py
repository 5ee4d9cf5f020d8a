"""Tiny traces whose cycles were counted by hand.

A line that misses at time t on a quiet bus is there at t + 20 (L2) + 200 (DRAM) + 8 (bus); a hit at t + 20; a vector computes for 16.
"""

import pytest
from qplug_hardware.nvr.config import Machine, Runahead, Settings
from qplug_hardware.nvr.models import simulate
from qplug_hardware.nvr.trace import Trace


def run(rows, model="none", row_bytes=64, *, runahead=None, tables=(), **machine):
    trace = Trace("hand", rows, 64, row_bytes, tables)
    return simulate(trace, model, Settings(machine=Machine(**machine), runahead=runahead or Runahead()))


def test_one_gather():
    assert run([5]).cycles == 228 + 228 + 16


def test_a_row_of_two_lines_waits_for_the_bus_twice():
    assert run([5], row_bytes=128).cycles == 228 + (20 + 200 + 8 + 8) + 16


def test_lanes_that_want_the_same_line_ask_once_and_the_next_vector_hits():
    # 17 gathers: the 17th index is in the second index line, its row is there
    done = run([5] * 17)
    assert done.cycles == (228 + 228 + 16) + (228 + 20 + 16)
    assert [x.total for x in done.ledgers] == [2, 2]


def test_without_a_free_mshr_a_lane_waits_for_the_line_before():
    assert run([5], row_bytes=128, mshrs=1).cycles == 228 + 228 + 228 + 16


def test_a_table_is_one_more_dependent_load():
    assert run([3], tables=([0, 1, 2, 9],)).cycles == 3 * 228 + 16


def test_next_line_halves_the_misses_of_a_pair_and_gains_nothing():
    base, done = run([5], row_bytes=128), run([5], "next-line", row_bytes=128)
    # the second line was asked for in the same cycle: it comes when it came before
    assert done.cycles == base.cycles == 480
    assert (base.ledgers[1].misses, done.ledgers[1].misses, done.ledgers[1].late) == (2, 1, 1)


# vectors of 4: rows 0 … 3, then 4 … 7; one index line.
#   0   index line asked for, there at 228; a chain waits for it, too
# 228   rows 0 … 3 asked for: 456, 464, 472, 480; they show the pattern, and the chain asks for rows 4 … 7: 488, 496, 504, 512
# 496   (480 + 16) second vector: index hits, 516
EIGHT = list(range(8))


def test_baseline_of_two_vectors():
    # rows 4 … 7 at 516 + 220 + 4 · 8
    assert run(EIGHT, vector=4).cycles == 516 + 252 + 16


@pytest.mark.parametrize(("model", "hit"), [("nvr", 20), ("dvr", 20), ("nvr-nsb", 2)])
def test_runahead_has_the_second_vector_in_time(model, hit):
    done = run(EIGHT, model, vector=4)
    assert done.cycles == 516 + hit + 16
    rows = done.ledgers[1]
    assert (rows.cold, rows.timely, rows.late, done.prefetches, done.fetches) == (4, 4, 0, 4, 9)


def test_late_lines_are_waited_for_and_counted_apart():
    # no arithmetic: the second vector wants its rows at 480 + 20 = 500, when two of them are under way
    done = run(EIGHT, "nvr", vector=4, compute=0)
    assert (done.ledgers[1].timely, done.ledgers[1].late) == (2, 2)
    assert done.cycles == 520
    # at half the bandwidth rows 0 … 3 are there at 512 (448 + 4 · 16), the others at 528, 544, 560, 576
    slow = run(EIGHT, "nvr", vector=4, compute=0, bus_cycles=16)
    assert run(EIGHT, vector=4, compute=0, bus_cycles=16).cycles == (236 + 220 + 64) + 20 + 220 + 64
    # index line 236; rows 236 + 220 + 64 = 520; second index 540; the last row 520 + 64 = 584
    assert slow.cycles == 584 and slow.ledgers[1].late == 3 and slow.ledgers[1].timely == 1


def test_depth_ends_in_the_middle_of_a_vector():
    # two elements ahead: rows 4 and 5 come with the first vector; 6 and 7 are asked for by the program
    done = run(EIGHT, "nvr", vector=4, runahead=Runahead(depth=2))
    assert (done.ledgers[1].timely, done.ledgers[1].cold) == (2, 6)
    assert done.cycles == 516 + 220 + 2 * 8 + 16


def test_the_bound_of_two_vectors():
    # nine lines, the last there at 220 + 9 · 8; four are wanted by the second vector's last step, then 16 of arithmetic
    done = run(EIGHT, "oracle", vector=4)
    assert done.cycles == max(220 + 5 * 8 + 16 + 2, 220 + 9 * 8) + 16
