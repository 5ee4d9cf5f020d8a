"""What no prefetcher can beat: the fewest lines, each as early as the bus allows.

Lines: Belady's rule (evict what is wanted last) over a fully associative store that is as large as L2, the speculative buffer and all MSHRs together.
Whatever a prefetcher does, what it holds and has on its way fits in there, so it fetches at least as many lines.

Time: line k of them, in the order of the program, cannot arrive before L2 latency + DRAM latency + (k + 1) bus cycles, and every step takes at least
the shorter of the hit latencies.  The room that early lines would need is not counted: this is a bound, not a machine.
"""

import heapq
from collections.abc import Sequence

from qplug_hardware.nvr.config import CacheShape, Machine
from qplug_hardware.nvr.memory import Ledger
from qplug_hardware.nvr.simulate import Outcome, Program
from qplug_hardware.nvr.trace import Ints


def fewest_fetches(wanted: Sequence[int], capacity: int) -> list[bool]:
    """For each request, whether it must be fetched, under Belady's rule with room for `capacity` lines."""
    never = len(wanted)
    following = [never] * len(wanted)
    last: dict[int, int] = {}
    for i in range(len(wanted) - 1, -1, -1):
        following[i] = last.get(wanted[i], never)
        last[wanted[i]] = i
    held: dict[int, int] = {}  # line → when it is wanted next
    heap: list[tuple[int, int]] = []  # (-when, line); entries that `held` contradicts are old
    fetched = []
    for i, line in enumerate(wanted):
        missing = line not in held
        fetched.append(missing)
        if missing and len(held) >= capacity:
            while True:
                when, victim = heapq.heappop(heap)
                if held.get(victim) == -when:
                    del held[victim]
                    break
        held[line] = following[i]
        heapq.heappush(heap, (-following[i], line))
    return fetched


def run_oracle(program: Program, machine: Machine, nsb: CacheShape) -> Outcome:
    """The bound as an outcome.  A line that the bus brings after the load wanted it counts as late, one that comes before as timely."""
    steps = [(stage, program.step_lines(stage, a, b)) for a, b in program.vectors for stage in range(program.stages)]
    capacity = (machine.l2.size + nsb.size) // machine.line + machine.mshrs
    fetched = iter(fewest_fetches([line for _, lines in steps for line in lines], capacity))
    ledgers = tuple(Ledger() for _ in range(program.stages))
    hit = min(machine.l2.latency, nsb.latency)
    first = machine.l2.latency + machine.dram_latency
    now = count = 0
    for stage, lines in steps:
        ready, ledger = now + hit, ledgers[stage]
        for _ in lines:
            if not next(fetched):
                ledger.hit += 1
                continue
            count += 1
            arrives = first + count * machine.bus_cycles
            if arrives > now:
                ledger.late += 1
            else:
                ledger.timely += 1
            ready = max(ready, arrives)
        now = ready + (machine.compute if stage == program.stages - 1 else 0)
    gathered: Ints = program.trace.targets
    return Outcome(now, len(program.vectors), ledgers, count, count, 0, 0, 0, gathered)
