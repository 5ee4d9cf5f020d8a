"""The cache against a list that is searched, and the rules of the memory behind it."""

from hypothesis import given, settings
from hypothesis import strategies as st
from qplug_hardware.nvr.cache import Cache
from qplug_hardware.nvr.config import CacheShape, Machine
from qplug_hardware.nvr.memory import Memory


class NaiveCache:
    """All lines in one list, the oldest first; a set is what shares a remainder."""

    def __init__(self, sets, ways):
        self.sets, self.ways, self.lines = sets, ways, []

    def use(self, line):
        if line not in self.lines:
            return False
        self.lines.remove(line)
        self.lines.append(line)
        return True

    def insert(self, line):
        if self.use(line):
            return None
        self.lines.append(line)
        same = [n for n in self.lines if n % self.sets == line % self.sets]
        if len(same) <= self.ways:
            return None
        self.lines.remove(same[0])
        return same[0]


@settings(deadline=None)
@given(st.sampled_from([(1, 1), (1, 4), (4, 2), (3, 3)]), st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60))
def test_cache_is_least_recently_used(shape, requests):
    sets, ways = shape
    ours, naive = Cache(CacheShape(size=sets * ways * 64, ways=ways, latency=1), 64), NaiveCache(sets, ways)
    for insert, line in requests:
        if insert:
            assert ours.insert(line) == naive.insert(line)
        else:
            assert ours.use(line) == naive.use(line)
        assert all((n in ours) == (n in naive.lines) for n in range(21))


def test_looking_does_not_make_a_line_younger():
    cache = Cache(CacheShape(size=128, ways=2, latency=1), 64)
    cache.insert(0)
    cache.insert(1)
    assert 0 in cache
    assert cache.insert(2) == 0


SMALL = Machine(l2=CacheShape(size=64 * 4, ways=4, latency=20), mshrs=3)


def test_transfers_follow_one_another_on_the_bus():
    memory = Memory(SMALL, None, 1)
    assert [memory.load(0, 1, 0), memory.prefetch(0, 2), memory.load(5, 3, 0)] == [228, 236, 244]
    # a request behind a quiet bus waits for DRAM alone
    assert memory.load(1000, 4, 0) == 1228


def test_no_more_lines_are_on_their_way_than_mshrs():
    memory = Memory(SMALL, None, 1)
    for line in (1, 2, 3):
        assert memory.prefetch(0, line) is not None
    assert memory.prefetch(0, 4) is None and memory.load(0, 4, 0) is None
    assert memory.load(0, 2, 0) == 236  # one under way needs no other MSHR
    assert memory.first_arrival == 228
    assert memory.load(228, 4, 0) == 228 + 228
    assert memory.fetches == 4 and memory.prefetches == 3


def test_a_line_enters_when_it_arrives():
    memory = Memory(SMALL, None, 1)
    memory.prefetch(0, 7)
    assert memory.holds(227, 7) and not memory.arrived(227, 7)
    assert memory.arrived(228, 7)


def test_a_load_is_counted_by_what_it_finds():
    memory = Memory(SMALL, None, 1)
    memory.load(0, 1, 0)  # cold
    memory.load(0, 1, 0)  # under way, for a load
    memory.prefetch(0, 2)
    memory.load(10, 2, 0)  # late
    memory.prefetch(300, 3)
    memory.load(600, 3, 0)  # timely
    memory.load(700, 3, 0)  # hit
    for i, line in enumerate((4, 5, 6)):
        memory.load(1000 * (i + 1), line, 0)
    memory.load(5000, 1, 0)  # again: six lines went through four ways
    own = memory.ledgers[0]
    assert (own.hit, own.timely, own.late, own.cold, own.again) == (2, 1, 1, 4, 1)
    assert own.total == 9 and own.misses == 5


def test_the_buffer_keeps_speculation_out_of_l2():
    l2 = CacheShape(size=64 * 2, ways=2, latency=20)
    machine = Machine(l2=l2)
    memory = Memory(machine, CacheShape(size=64 * 2, ways=2, latency=2), 1)
    memory.load(0, 10, 0)
    memory.load(0, 11, 0)
    memory.prefetch(0, 20)
    memory.prefetch(0, 21)
    assert memory.load(1000, 10, 0) == 1020 and memory.load(1000, 11, 0) == 1020  # not pushed out of L2
    assert memory.load(1000, 20, 0) == 1002
    # the buffer has two ways: the third prefetch pushes the unused 21 on to L2, where it is found
    memory.prefetch(1000, 22)
    assert memory.load(2000, 21, 0) == 2020
    assert memory.ledgers[0].timely == 2 and memory.ledgers[0].misses == 2
