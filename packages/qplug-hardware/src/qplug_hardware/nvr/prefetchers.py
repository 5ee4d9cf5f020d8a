"""Prefetchers that hardware has today: next line, unit-stride streams, and IMP."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace

from qplug_hardware.nvr.config import Indirect, Stream
from qplug_hardware.nvr.patterns import Affine
from qplug_hardware.nvr.simulate import NoPrefetcher, Process, Simulation, Step


class NextLine(NoPrefetcher):
    """A load that misses asks for the next line too, unless all MSHRs are taken."""

    def start(self, simulation: Simulation) -> None:
        self._sim = simulation

    def on_line(self, stage: int, line: int, missed: bool) -> None:
        if missed:
            self._sim.memory.prefetch(self._sim.now, line + 1)


class StreamPrefetcher(NoPrefetcher):
    """Lines that a load instruction asks for one after the other are a stream; once it is confirmed, it is kept `distance` lines ahead.

    Streams are told apart by the load instruction (the stage), so that gathers do not push the index stream out of the table.  What finds no MSHR
    waits in a queue; while the queue is full a stream asks for nothing, and goes on from there when the program goes on.
    """

    def __init__(self, config: Stream, stages: Sequence[int] | None = None) -> None:
        self._config = config
        self._stages = stages
        # for each stage: expected line → [confirmations, first line that is not asked for yet]
        self._streams: defaultdict[int, OrderedDict[int, list[int]]] = defaultdict(OrderedDict)
        self._queue: deque[int] = deque()

    def start(self, simulation: Simulation) -> None:
        self._sim = simulation

    def on_line(self, stage: int, line: int, missed: bool) -> None:
        if self._stages is not None and stage not in self._stages:
            return
        own = self._streams[stage]
        if line + 1 in own:
            return
        entry = own.pop(line, None)
        entry = [0, line + 1] if entry is None else [entry[0] + 1, max(entry[1], line + 1)]
        own[line + 1] = entry
        if len(own) > self._config.streams:
            own.popitem(last=False)
        if entry[0] < self._config.confirmations:
            return
        idle = not self._queue
        while entry[1] <= line + self._config.distance and len(self._queue) < self._config.queue:
            self._queue.append(entry[1])
            entry[1] += 1
        if idle and self._queue:
            self._sim.wake(self._drain())

    def _drain(self) -> Process:
        memory, sim = self._sim.memory, self._sim
        while self._queue:
            while memory.prefetch(sim.now, self._queue[0]) is None:
                yield memory.first_arrival, 1
            self._queue.popleft()


class IMP(NoPrefetcher):
    """Indirect memory prefetcher: index i was followed by address base + (i << shift), so the same is done `distance` elements ahead.

    Source: Yu et al., "IMP: Indirect Memory Prefetcher", MICRO 2015.  Its optional second level is left out, so behind a table it prefetches the
    table's entries alone.  It walks through the index array as it lies in memory, one element a cycle, knows no loops, and does nothing for an
    element whose index has not arrived.  Of elements that wait for an MSHR the oldest are dropped, for they are wanted too soon.  A stream
    prefetcher for the indices belongs to it.  It learns from the first step after the indices.
    """

    def __init__(self, config: Indirect, stream: Stream, distance: int) -> None:
        self._config = config
        self._stream = stream
        self._distance = distance
        self._pattern = Affine(config.confirmations, shifts_only=True)
        self._queue: deque[tuple[int, int]] = deque(maxlen=config.queue)  # (when the index is read, position)
        self._busy = False

    def start(self, simulation: Simulation) -> None:
        self._sim = simulation
        per_line = max(1, simulation.machine.line // simulation.program.trace.index_bytes)
        reach = replace(self._stream, distance=-(-self._distance // per_line) + self._config.lead)
        self._indices = StreamPrefetcher(reach, stages=(0,))
        self._indices.start(simulation)

    def on_line(self, stage: int, line: int, missed: bool) -> None:
        if self._distance:
            self._indices.on_line(stage, line, missed)

    def on_step(self, step: Step) -> None:
        if not self._distance:
            return
        if step.stage == 1:
            self._pattern.observe(step.keys, step.addresses)
        elif step.stage == 0 and self._pattern.known:
            read = self._sim.now + self._sim.machine.l2.latency
            size = len(self._sim.program.trace.indices)
            self._queue.extend((read, p + self._distance) for p in step.keys if p + self._distance < size)
            if self._queue and not self._busy:
                self._busy = True
                self._sim.wake(self._drain())

    def _drain(self) -> Process:
        sim = self._sim
        program, memory = sim.program, sim.memory
        while self._queue:
            when, p = self._queue.popleft()
            if when > sim.now:
                yield when, 1
            if all(memory.arrived(sim.now, line) for line in program.index_lines([p])):
                address = self._pattern.address(int(program.trace.indices[p]))
                for line in program.lines(address, program.widths[1]):
                    while memory.prefetch(sim.now, line) is None:
                        yield memory.first_arrival, 1
            yield sim.now + 1, 1
        self._busy = False
