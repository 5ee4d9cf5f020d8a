"""What is told of a run, and the size of the tables that a model needs."""

from dataclasses import asdict, dataclass
from typing import Any

from qplug_hardware.nvr.config import Settings
from qplug_hardware.nvr.simulate import Outcome

_ADDRESS = 48
_COUNTER = 2


@dataclass(frozen=True)
class Result:
    """One model against the baseline without prefetching.

    Loads are counted once for each line of each vector.  A load of a line that a prefetch has under way is *late*: it still waits, so it is neither a
    miss nor covered, and it is counted apart.

    accesses, hits, timely, late, misses_cold, misses_again: of all stages; they add up (see `memory.Ledger`)
    coverage:           1 - (misses + late) / misses of the baseline: what a load no longer waits for DRAM for
    coverage_with_late: 1 - misses / misses of the baseline: late ones counted as covered, as many reports do
    accuracy:           prefetched lines that were loaded / prefetched lines;  timeliness: timely / (timely + late).  None where there are none
    stall_cycles:       cycles in which the arithmetic waits, hits included
    bus_bound:          offchip lines · bus cycles: no run with this traffic can be quicker
    data_miss_rate:     of the loads of rows alone
    by_stage:           the counts of indices, tables and rows
    """

    model: str
    cycles: int
    speedup: float
    stall_cycles: int
    bus_bound: int
    accesses: int
    hits: int
    timely: int
    late: int
    misses_cold: int
    misses_again: int
    coverage: float
    coverage_with_late: float
    data_miss_rate: float
    issued: int
    redundant: int
    accuracy: float | None
    timeliness: float | None
    evicted_unused: int
    left_unused: int
    offchip_bytes: int
    area: dict[str, int]
    by_stage: dict[str, dict[str, int]]

    @property
    def misses(self) -> int:
        return self.misses_cold + self.misses_again

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(model: str, own: Outcome, base: Outcome, settings: Settings, levels: int) -> Result:
    """own: the model's run;  base: that of `none` on the same trace and machine"""
    names = ["indices", *(f"table {i}" for i in range(1, levels)), "rows"]
    timely, late = sum(x.timely for x in own.ledgers), sum(x.late for x in own.ledgers)
    misses, before = sum(x.misses for x in own.ledgers), sum(x.misses for x in base.ledgers)
    rows = own.ledgers[-1]
    machine = settings.machine
    return Result(
        model=model,
        cycles=own.cycles,
        speedup=base.cycles / own.cycles,
        stall_cycles=own.cycles - own.vectors * machine.compute,
        bus_bound=own.fetches * machine.bus_cycles,
        accesses=sum(x.total for x in own.ledgers),
        hits=sum(x.hit for x in own.ledgers),
        timely=timely,
        late=late,
        misses_cold=sum(x.cold for x in own.ledgers),
        misses_again=sum(x.again for x in own.ledgers),
        coverage=1 - (misses + late) / before,
        coverage_with_late=1 - misses / before,
        data_miss_rate=rows.misses / rows.total,
        issued=own.prefetches,
        redundant=own.redundant,
        accuracy=(timely + late) / own.prefetches if own.prefetches else None,
        timeliness=timely / (timely + late) if timely + late else None,
        evicted_unused=own.evicted_unused,
        left_unused=own.left_unused,
        offchip_bytes=own.fetches * machine.line,
        area=area(model, settings, levels),
        by_stage={n: asdict(x) for n, x in zip(names, own.ledgers, strict=True)},
    )


def area(model: str, settings: Settings, levels: int) -> dict[str, int]:
    """Bits of each table: entries · bits, addresses of 48 bits, counters of 2.  A proxy for comparison, not an area: no logic, no wires.

    {"l2": bits} stands beside, to set the sum against.
    """
    machine, runahead = settings.machine, settings.runahead
    parts: dict[str, int] = {}
    pattern = 2 * _ADDRESS + 16 + _COUNTER  # base, last pair, stride
    if model == "stream":
        parts["streams"] = (1 + levels) * settings.stream.streams * (2 * _ADDRESS + _COUNTER)
    elif model == "imp":
        parts["streams"] = settings.stream.streams * (2 * _ADDRESS + _COUNTER)
        parts["patterns"] = pattern
        parts["queue"] = settings.imp.queue * _ADDRESS
    elif model in ("dvr", "nvr", "nvr-nsb"):
        if runahead.sd:
            parts["sd"] = 2 * (2 * _ADDRESS + 16 + _COUNTER)  # the index stream and the value stream
        if runahead.scd:
            parts["scd"] = levels * pattern
        if runahead.lbd:
            parts["lbd"] = 2 * 3 * 32  # two nested loops: counter, bound, stride
        width = machine.vector if runahead.vmig and model != "dvr" else 1
        parts["vmig" if runahead.vmig and model != "dvr" else "chains"] = runahead.chains * width * _ADDRESS
    if model == "nvr-nsb":
        lines = settings.nsb.size // machine.line
        parts["nsb"] = lines * (8 * machine.line + _ADDRESS)
    lines = machine.l2.size // machine.line
    return {**parts, "sum": sum(parts.values()), "l2": lines * (8 * machine.line + _ADDRESS)}
