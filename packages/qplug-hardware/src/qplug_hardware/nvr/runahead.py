"""NVR: a sub-thread beside the program that runs ahead through index → … → data, and asks for the lines that the program will gather.

Source: https://arxiv.org/abs/2502.13873 (DAC 2025), as far as its text goes; there is no released code.  Four units, each of which can be left out:

stride detector (SD)        asks for the lines of the index stream (and of streamed values) `depth` elements and `lead` lines ahead
sparse chain detector (SCD) learns base and stride of every level from the program's own loads, so that an index gives an address
loop bound detector (LBD)   knows where the row ends and which row the program visits next
micro-instructions (VMIG)   a step handles a whole vector of elements and asks for each line once

Several chains advance side by side: each takes the next group of elements, waits for its indices to arrive, asks for the entries of the first
table, waits, and so on; the rows of data are asked for and not waited for.  An index is known to the sub-thread only once its line has arrived.
Where several wait for an MSHR, the stride detector goes first, then the chain whose elements the program reaches first.

The sub-thread starts at the program's first load of indices.  `stalled_only` makes it the DVR-like model: it makes its steps only while the program
waits for a line that missed, and keeps its place between.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from qplug_hardware.nvr.config import Runahead
from qplug_hardware.nvr.patterns import Affine
from qplug_hardware.nvr.simulate import SLEEP, NoPrefetcher, Process, Simulation, Step


class RunaheadPrefetcher(NoPrefetcher):
    def __init__(self, config: Runahead, *, stalled_only: bool = False) -> None:
        self._config = config
        self._stalled_only = stalled_only

    def start(self, simulation: Simulation) -> None:
        self._sim = simulation
        program = simulation.program
        self._patterns = [Affine(1) for _ in range(program.stages - 1)]
        self._width = simulation.machine.vector if self._config.vmig else 1
        self._per_line = max(1, simulation.machine.line // program.trace.index_bytes)
        self._size = len(program.trace.indices)
        lengths = np.diff(program.trace.loops)[:, 0]
        self._ends = np.repeat(np.cumsum(lengths), lengths).tolist()  # where the loop of an element ends, in the order of the program
        self._place = 0  # first element whose index the program has not asked for
        self._next = 0  # first element that no chain has taken
        self._streamed = 0  # first element whose index the stride detector has not asked for
        self._put_back: deque[tuple[int, int]] = deque()
        self._stall_ends = 0
        self._asleep: list[Process] = []
        self._started = False

    def on_step(self, step: Step) -> None:
        if not self._config.depth:
            return
        if step.stage == 0:
            self._follow(step)
        elif self._config.scd:
            self._patterns[step.stage - 1].observe(step.keys, step.addresses)
        if self._stalled_only and step.missed:
            self._stall_ends = step.ready
        if not self._started:
            self._started = True
            self._asleep = [self._stream()] if self._config.sd else []
            self._asleep += [self._chain() for _ in range(self._config.chains)] if self._config.scd else []
        woken, self._asleep = self._asleep, []
        for process in woken:
            self._sim.wake(process)

    # What lies ahead is a numbering of elements.  With loop bounds it is the order of the program; without, the order of the index array in memory.

    def _follow(self, step: Step) -> None:
        """Move to the element behind the program's vector."""
        place = step.end if self._config.lbd else step.keys[-1] + 1
        if not self._place <= place <= max(self._next, self._place + self._width):
            # the program went elsewhere: what was run ahead for is of no use, or out of reach
            self._next = self._streamed = place
            self._put_back.clear()
        self._place = place
        self._next = max(self._next, place)
        self._streamed = max(self._streamed, place)

    def _positions(self, first: int, end: int) -> Sequence[int]:
        """Positions in the index array of elements ahead."""
        return self._sim.program.visited[first:end] if self._config.lbd else range(first, end)

    def _stretch(self, first: int, reach: int) -> int:
        """Where a step that begins at `first` ends: after a vector, or `reach` elements ahead of the program, or at the end of its loop."""
        end = min(first + self._width, self._place + reach)
        if not self._config.lbd:
            return end
        return min(end, self._ends[first]) if first < len(self._ends) else first

    def _stream(self) -> Process:
        """The stride detector's prefetches, one step a cycle."""
        sim = self._sim
        reach = self._config.depth + self._config.lead * self._per_line
        while True:
            first, end = self._streamed, self._stretch(self._streamed, reach)
            if end <= first or self._resting:
                yield self._sleep()
                continue
            self._streamed = end
            yield from self._ask(sim.program.stream_lines(self._positions(first, end)), 1, wait=False)
            yield sim.now + 1, 1

    def _chain(self) -> Process:
        """One chain: group after group, each through all levels."""
        while True:
            taken = None if self._resting else self._take()
            if taken is None:
                yield self._sleep()
                continue
            positions = [p for p in self._positions(*taken) if p < self._size]
            lines = self._sim.program.index_lines(positions)
            if not self._config.sd and not all(self._sim.memory.holds(self._sim.now, line) for line in lines):
                self._put_back.append(taken)
                yield self._sleep()
                continue
            rank = 2 + taken[0]
            yield from self._ask(lines, rank, wait=True)
            yield from self._levels(positions, rank)

    def _levels(self, positions: Sequence[int], rank: int) -> Process:
        program = self._sim.program
        keys = program.trace.indices[positions].tolist()
        for level, pattern in enumerate(self._patterns):
            while not pattern.known:
                yield self._sleep()
            width = program.widths[level + 1]
            last = level == len(self._patterns) - 1
            yield from self._ask(dict.fromkeys(n for k in keys for n in program.lines(pattern.address(k), width)), rank, wait=not last)
            if not last:
                keys = program.trace.tables[level][keys].tolist()

    def _ask(self, lines: Iterable[int], rank: int, wait: bool) -> Process:
        """Ask for lines.  wait: until the last of them can be read"""
        memory, sim = self._sim.memory, self._sim
        ready = sim.now
        for line in lines:
            while self._resting:
                yield self._sleep()
            while (arrives := memory.prefetch(sim.now, line)) is None:
                yield memory.first_arrival, rank
            ready = max(ready, arrives)
        if wait and ready > sim.now:
            yield ready, rank

    def _take(self) -> tuple[int, int] | None:
        """The next group of elements within the depth that the program has not passed."""
        while self._put_back:
            first, end = self._put_back.popleft()
            if end > self._place:
                return first, end
        first, end = self._next, self._stretch(self._next, self._config.depth)
        if end <= first:
            return None
        self._next = end
        return first, end

    @property
    def _resting(self) -> bool:
        return self._stalled_only and self._sim.now >= self._stall_ends

    def _sleep(self) -> tuple[int, int]:
        """Until the program's next step."""
        self._asleep.append(self._sim.current)
        return SLEEP
