"""The reference simulator: processes that take turns in the order of time.

A process is a generator that yields the time at which it wants to go on and its rank, or SLEEP until it is woken.  The program is one process,
with rank 0; a prefetcher hears of every load and starts processes of its own.  At equal times the lowest rank goes first, then who asked first, so a
run has one outcome.

The program, for each vector of up to 16 elements of a loop, in order and without overlap:

    load the lines of its indices (and streamed values)      wait for the last one
    load the lines of each table's entries, table by table    wait for the last one
    load the lines of its rows                                wait for the last one
    compute

All lines of one step are asked for at once, each line once; where no MSHR is free the rest of them waits.
"""

import heapq
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qplug_hardware.nvr.config import CacheShape, Machine
from qplug_hardware.nvr.memory import Ledger, Memory
from qplug_hardware.nvr.trace import Ints, Layout, Trace, spans

SLEEP = (-1, 0)
Process = Generator[tuple[int, int], None, None]


@dataclass(frozen=True)
class Step:
    """One step of the program, as a prefetcher sees it.

    stage:       0 = the indices, 1 … = the tables, last = the rows
    first, end:  the vector's elements, counted in the order of the program
    keys:        what was followed: positions in `indices`, indices into a table, or rows
    addresses:   of what was loaded, one for each key
    ready:       when the program goes on;  missed: whether it waits longer than for a hit
    """

    stage: int
    first: int
    end: int
    keys: Sequence[int]
    addresses: Sequence[int]
    ready: int
    missed: bool


class Prefetcher(Protocol):
    """Hears of the program's loads.  It may read index memory whose lines are there, and nothing of the trace besides."""

    def start(self, simulation: "Simulation") -> None:
        """Called once, before anything runs."""

    def on_line(self, stage: int, line: int, missed: bool) -> None:
        """The program has asked for one line; missed: it was neither there nor on its way."""

    def on_step(self, step: Step) -> None:
        """The program has asked for all lines of a step."""


class NoPrefetcher:
    """The baseline."""

    def start(self, simulation: "Simulation") -> None:
        pass

    def on_line(self, stage: int, line: int, missed: bool) -> None:
        pass

    def on_step(self, step: Step) -> None:
        pass


class Program:
    """What the program loads, vector by vector: the same for every prefetcher."""

    def __init__(self, trace: Trace, machine: Machine) -> None:
        self.trace = trace
        self.layout = Layout.of(trace)
        self._line = machine.line
        self.vectors = spans([(int(a), int(b)) for a, b in trace.loops], machine.vector)
        self.visited = trace.visited.tolist()
        # keys of every stage for every element: position, index, index in the second table …, row
        keys = [trace.visited]
        followed = trace.indices[trace.visited]
        for table in (*trace.tables, None):
            keys.append(followed)
            followed = followed if table is None else table[followed]
        self.keys = [k.tolist() for k in keys]
        self.stages = len(keys)
        self.bases = (self.layout.index, *self.layout.tables, self.layout.data)
        self.widths = (trace.index_bytes, *(trace.index_bytes for _ in trace.tables), trace.row_bytes)

    def lines(self, address: int, width: int) -> range:
        """Lines that hold bytes address … address + width - 1."""
        return range(address // self._line, (address + width - 1) // self._line + 1)

    def stream_lines(self, positions: Sequence[int]) -> list[int]:
        """Lines of the indices, and of the values beside them, at these positions."""
        trace, layout = self.trace, self.layout
        found = dict.fromkeys(n for p in positions for n in self.lines(layout.index + p * trace.index_bytes, trace.index_bytes))
        if trace.value_bytes:
            found |= dict.fromkeys(n for p in positions for n in self.lines(layout.value + p * trace.value_bytes, trace.value_bytes))
        return list(found)

    def index_lines(self, positions: Sequence[int]) -> list[int]:
        """Lines of the indices at these positions."""
        width, base = self.trace.index_bytes, self.layout.index
        return list(dict.fromkeys(n for p in positions for n in self.lines(base + p * width, width)))

    def step_lines(self, stage: int, first: int, end: int) -> list[int]:
        """Lines of one step, each once, in the order of the lanes."""
        keys = self.keys[stage][first:end]
        if stage == 0:
            return self.stream_lines(keys)
        base, width = self.bases[stage], self.widths[stage]
        return list(dict.fromkeys(n for k in keys for n in self.lines(base + k * width, width)))


class Simulation:
    """One run.  `current`: the process that has its turn;  `now`: its time"""

    current: Process

    def __init__(self, program: Program, machine: Machine, prefetcher: Prefetcher, nsb: CacheShape | None = None) -> None:
        self.program = program
        self.machine = machine
        self.memory = Memory(machine, nsb, program.stages)
        self.now = 0
        self.cycles = 0
        self.gathered: list[int] = []
        self._prefetcher = prefetcher
        self._turns: list[tuple[int, int, int, Process]] = []
        self._asked = 0

    def wake(self, process: Process) -> None:
        """Give a process, new or asleep, a turn at this time, behind the program."""
        self._push(self.now, 1, process)

    def run(self) -> None:
        self._prefetcher.start(self)
        core = self._core()
        self._push(0, 0, core)
        turns = self._turns
        while turns:
            self.now, _, _, process = heapq.heappop(turns)
            self.current = process
            wanted = next(process, None)
            if wanted is None and process is core:
                break
            if wanted is not None and wanted is not SLEEP:
                self._push(*wanted, process)
        self.cycles = self.now

    def _push(self, time: int, rank: int, process: Process) -> None:
        assert time >= self.now, (time, self.now)
        self._asked += 1
        heapq.heappush(self._turns, (time, rank, self._asked, process))

    def _core(self) -> Process:
        program, memory, tell = self.program, self.memory, self._prefetcher
        hit = self.machine.l2.latency
        for first, end in program.vectors:
            for stage in range(program.stages):
                ready, missed = self.now, False
                for line in program.step_lines(stage, first, end):
                    before = memory.fetches
                    while (arrives := memory.load(self.now, line, stage)) is None:
                        yield memory.first_arrival, 0
                        before = memory.fetches
                    tell.on_line(stage, line, memory.fetches > before)
                    missed = missed or arrives > self.now + hit
                    ready = max(ready, arrives)
                keys = program.keys[stage][first:end]
                base, width = program.bases[stage], program.widths[stage]
                tell.on_step(Step(stage, first, end, keys, [base + k * width for k in keys], ready, missed))
                yield ready, 0
            self.gathered += program.keys[-1][first:end]
            yield self.now + self.machine.compute, 0


@dataclass(frozen=True)
class Outcome:
    """What a run counted.

    cycles:         from the first load to the end of the last vector
    ledgers:        one for each stage: indices, tables, rows
    fetches:        lines that came from DRAM;  prefetches: those of them that a prefetch asked for
    redundant:      prefetches of lines that were there or on their way; they cost a look at the tags
    evicted_unused: prefetched lines that were evicted before a load wanted them;  left_unused: those that no load has wanted at the end
    gathered:       the rows that the program gathered, in its order
    """

    cycles: int
    vectors: int
    ledgers: tuple[Ledger, ...]
    fetches: int
    prefetches: int
    redundant: int
    evicted_unused: int
    left_unused: int
    gathered: Ints

    @classmethod
    def of(cls, done: Simulation) -> "Outcome":
        m = done.memory
        return cls(
            done.cycles, len(done.program.vectors), tuple(m.ledgers), m.fetches, m.prefetches, m.redundant, m.evicted_unused, m.unused,
            np.array(done.gathered, np.int64),
        )  # fmt: skip
