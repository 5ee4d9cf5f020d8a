"""L2, the speculative buffer, MSHRs and DRAM, and the ledger of what became of every line.

A line that is asked for and not there takes an MSHR until it arrives, at

    max(now + L2 latency + DRAM latency, end of the transfer before it) + bus cycles

so transfers follow one another in the order of the requests, and a line enters the cache when it arrives, not when it is asked for.
Whoever calls must not go back in time.
"""

from collections import deque
from dataclasses import dataclass

from qplug_hardware.nvr.cache import Cache
from qplug_hardware.nvr.config import CacheShape, Machine


@dataclass
class Ledger:
    """What became of the loads of one stage: one count for each line of each vector.

    hit:    there, from a load before
    timely: there, from a prefetch, and loaded for the first time since
    late:   on its way, from a prefetch: the load waits for the rest of it
    cold:   not there, and never fetched before
    again:  not there, and fetched before: it was evicted
    """

    hit: int = 0
    timely: int = 0
    late: int = 0
    cold: int = 0
    again: int = 0

    @property
    def misses(self) -> int:
        return self.cold + self.again

    @property
    def total(self) -> int:
        return self.hit + self.timely + self.late + self.misses


class Memory:
    """nsb: None = no speculative buffer.  With one, prefetched lines arrive there and not in L2; a line goes on to L2 when it is loaded first, or
    when the buffer has no room for it any more."""

    def __init__(self, machine: Machine, nsb: CacheShape | None, stages: int) -> None:
        self._machine = machine
        self._l2 = Cache(machine.l2, machine.line)
        self._nsb = None if nsb is None else Cache(nsb, machine.line)
        self._l2_latency = machine.l2.latency
        self._nsb_latency = 0 if nsb is None else nsb.latency
        self._bus_free = 0
        self._arrivals: deque[tuple[int, int]] = deque()  # (time, line), in order of time
        self._on_way: dict[int, int] = {}  # line → time
        self._speculative: set[int] = set()  # prefetched and not loaded yet: on the way, in the buffer, or in L2
        self._seen: set[int] = set()
        self.ledgers = [Ledger() for _ in range(stages)]
        self.prefetches = 0
        self.fetches = 0
        self.redundant = 0
        self.evicted_unused = 0

    @property
    def first_arrival(self) -> int:
        """When the next line arrives, and its MSHR is free."""
        return self._arrivals[0][0]

    def load(self, now: int, line: int, stage: int) -> int | None:
        """The time at which the program has the line; None when it needs an MSHR and none is free."""
        self._advance(now)
        ledger = self.ledgers[stage]
        if self._nsb is not None and self._nsb.use(line):
            if line in self._speculative:
                self._speculative.remove(line)
                ledger.timely += 1
                self._into_l2(line)
            else:
                ledger.hit += 1
            return now + self._nsb_latency
        if self._l2.use(line):
            if line in self._speculative:
                self._speculative.remove(line)
                ledger.timely += 1
            else:
                ledger.hit += 1
            return now + self._l2_latency
        arrives = self._on_way.get(line)
        if arrives is not None:
            if line in self._speculative:
                self._speculative.remove(line)
                ledger.late += 1
            else:
                ledger.hit += 1
            return max(arrives, now + self._l2_latency)
        if len(self._on_way) >= self._machine.mshrs:
            return None
        if line in self._seen:
            ledger.again += 1
        else:
            ledger.cold += 1
        return self._fetch(now, line)

    def prefetch(self, now: int, line: int) -> int | None:
        """Ask for a line if it is neither there nor on its way; the time at which the prefetcher could read it.  None when no MSHR is free.

        A line that is there keeps its age: a prefetcher looks at tags and does not count as a use.
        """
        self._advance(now)
        if self._nsb is not None and line in self._nsb:
            self.redundant += 1
            return now + self._nsb_latency
        if line in self._l2:
            self.redundant += 1
            return now + self._l2_latency
        arrives = self._on_way.get(line)
        if arrives is not None:
            self.redundant += 1
            return max(arrives, now + self._l2_latency)
        if len(self._on_way) >= self._machine.mshrs:
            return None
        self.prefetches += 1
        self._speculative.add(line)
        return self._fetch(now, line)

    def holds(self, now: int, line: int) -> bool:
        """Whether the line is there or on its way."""
        self._advance(now)
        return line in self._on_way or line in self._l2 or (self._nsb is not None and line in self._nsb)

    def arrived(self, now: int, line: int) -> bool:
        """Whether the line is there."""
        return self.holds(now, line) and line not in self._on_way

    @property
    def unused(self) -> int:
        """Lines that were prefetched and not loaded, and are still there or on their way."""
        return len(self._speculative)

    def _fetch(self, now: int, line: int) -> int:
        m = self._machine
        arrives = max(now + self._l2_latency + m.dram_latency, self._bus_free) + m.bus_cycles
        self._bus_free = arrives
        self._arrivals.append((arrives, line))
        self._on_way[line] = arrives
        self._seen.add(line)
        self.fetches += 1
        return arrives

    def _advance(self, now: int) -> None:
        while self._arrivals and self._arrivals[0][0] <= now:
            line = self._arrivals.popleft()[1]
            del self._on_way[line]
            # a prefetch that a load has caught up with is no longer speculative
            if self._nsb is None or line not in self._speculative:
                self._into_l2(line)
                continue
            gone = self._nsb.insert(line)
            if gone is not None and gone in self._speculative:
                self._into_l2(gone)

    def _into_l2(self, line: int) -> None:
        gone = self._l2.insert(line)
        if gone is not None and gone in self._speculative:
            self._speculative.remove(gone)
            self.evicted_unused += 1
