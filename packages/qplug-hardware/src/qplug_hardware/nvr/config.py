"""The machine and the prefetchers, as frozen values that are checked when they are made.

Defaults: 64-byte lines, 256 KB of L2, 200 cycles to DRAM and 8 cycles of its bus for a line, vectors of 16 gathers.  Times are cycles, sizes bytes,
everywhere.
"""

from dataclasses import dataclass, field

from qcore.errors import SpecError


def require(name: str, value: object, allowed: str, holds: bool) -> None:
    """SpecError with the name, the value and what is allowed, unless `holds`."""
    if not holds:
        raise SpecError(f"{name} is {value!r}; allowed: {allowed}")


def whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """SpecError unless `value` is an integer in low … high."""
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    holds = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    require(name, value, allowed, holds)


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """A set-associative cache with least-recently-used replacement.

    latency: cycles from the request to the data of a hit
    """

    size: int
    ways: int
    latency: int

    def __post_init__(self) -> None:
        whole("size", self.size, 1)
        whole("ways", self.ways, 1)
        whole("latency", self.latency, 1)

    def sets(self, line: int) -> int:
        return self.size // (line * self.ways)

    def check(self, name: str, line: int) -> None:
        """SpecError unless the size is a whole number of sets of lines of `line` bytes."""
        one = line * self.ways
        require(f"{name}.size", self.size, f"a multiple of ways × line = {self.ways} × {line} = {one}", self.size % one == 0)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """An in-order vector machine before one cache and one channel of DRAM.

    dram_latency: cycles from the miss to the first byte, when the bus is free
    bus_cycles:   cycles of the bus for one line; lines · bus_cycles is the least time that a run can take
    vector:       gathers of one vector operation
    compute:      cycles of arithmetic for one vector
    mshrs:        lines that may be on their way at once, asked for by loads or by prefetches
    """

    line: int = 64
    l2: CacheShape = field(default_factory=lambda: CacheShape(size=256 << 10, ways=8, latency=20))
    dram_latency: int = 200
    bus_cycles: int = 8
    vector: int = 16
    compute: int = 16
    mshrs: int = 32

    def __post_init__(self) -> None:
        whole("machine.line", self.line, 8, 4096)
        require("machine.line", self.line, "a power of two", self.line & (self.line - 1) == 0)
        self.l2.check("l2", self.line)
        for name, low in (("dram_latency", 1), ("bus_cycles", 1), ("vector", 1), ("compute", 0), ("mshrs", 1)):
            whole(f"machine.{name}", getattr(self, name), low)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The stream prefetcher.

    distance:      lines that it keeps ahead of the loads; 64 are two vectors of 128-byte rows
    streams:       that each load instruction may have at once
    confirmations: lines in order after the first before it prefetches
    queue:         lines that may wait for an MSHR
    """

    distance: int = 64
    queue: int = 64
    streams: int = 16
    confirmations: int = 2

    def __post_init__(self) -> None:
        for name in ("distance", "queue", "streams", "confirmations"):
            whole(f"stream.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class Indirect:
    """IMP, the indirect memory prefetcher.

    distance:      elements ahead; None: the depth of the runahead, so that models differ in their mechanism and not in their reach
    confirmations: pairs of index and address that must agree with a base and a shift before it prefetches
    queue:         elements that may wait for an MSHR; beyond, the oldest are dropped
    lead:          lines by which its index stream runs further ahead.  With too few an index is not there when it is wanted, with too many it is gone
    """

    distance: int | None = None
    confirmations: int = 3
    queue: int = 64
    lead: int = 8

    def __post_init__(self) -> None:
        if self.distance is not None:
            whole("imp.distance", self.distance, 0)
        whole("imp.confirmations", self.confirmations, 1)
        whole("imp.queue", self.queue, 1)
        whole("imp.lead", self.lead, 1)


@dataclass(frozen=True, kw_only=True)
class Runahead:
    """The sub-thread of NVR, and of the DVR-like model.

    depth:   elements ahead of the vector that is being executed; 0 switches it off
    chains:  dependent chains that advance side by side
    lead:    lines by which the stride detector runs further ahead than `depth`, so that indices are there when a chain needs them
    sd:      stride detector: prefetches index and value lines.  Without it the sub-thread reads only what the loads have brought
    scd:     sparse chain detector: predicts the addresses of index → … → data.  Without it only streams are prefetched
    lbd:     loop bound detector: stops at the end of a row and goes on with the row that the program visits next.  Without it the
             sub-thread walks through the index array as it lies in memory, past the ends of rows and of the array
    vmig:    vector micro-instructions: a step handles as many elements as a vector has.  Without it a step handles one
    """

    depth: int = 128
    chains: int = 8
    lead: int = 4
    sd: bool = True
    scd: bool = True
    lbd: bool = True
    vmig: bool = True

    def __post_init__(self) -> None:
        whole("runahead.depth", self.depth, 0)
        whole("runahead.chains", self.chains, 1)
        whole("runahead.lead", self.lead, 0)
        for name in ("sd", "scd", "lbd", "vmig"):
            require(f"runahead.{name}", getattr(self, name), "true or false", isinstance(getattr(self, name), bool))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but the trace.

    nsb: the shape of the non-blocking speculative buffer; the model `nvr-nsb` and the oracle have it, the others do not
    """

    machine: Machine = field(default_factory=Machine)
    runahead: Runahead = field(default_factory=Runahead)
    stream: Stream = field(default_factory=Stream)
    imp: Indirect = field(default_factory=Indirect)
    nsb: CacheShape = field(default_factory=lambda: CacheShape(size=16 << 10, ways=16, latency=2))

    def __post_init__(self) -> None:
        self.nsb.check("nsb", self.machine.line)
