"""How much memory a run takes, estimated before it, and whether it keeps the model in memory or streams it.

The terms are counted from shapes; the factors of the solvers were measured (peak resident memory over N·K and K² values of 4 bytes, RTN with clip
search 3.7 N·K, GPTQ 2.9 N·K + 4.1 K²) and are rounded up.  `tools/bench/memory.py` compares the estimate with what runs took.
"""

import ctypes
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from qcore.errors import SpecError
from qcore.model.topology import Site, Topology
from qcore.numbers.granularity import Shape

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_LATER = 250 << 20  # what is imported after the plan, and what the allocator does not give back
_M_MMAP_THRESHOLD = -3  # of malloc.h
_NOISE = 16 << 20  # by which two processes that have done the same differ
_KEEP = 2 << 30  # outputs inside a block that are worth keeping
_SOLVE_WEIGHT, _SOLVE_GRAM = 4.5, 4.5  # float32 values for each of N·K and of K²


def parse_bytes(text: str) -> int:
    """ "3GiB", "4G", "500 MB", "1.5gb": bytes; SpecError for anything else"""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS:
        raise SpecError(f"{text!r} is no amount of memory; write it like 3GiB, 3500MB or 4G")
    return int(float(match[1]) * _UNITS[match[2]])


def available_memory() -> int | None:
    """Bytes that this machine can still give, swap left out; None where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def resident_memory() -> int:
    """Bytes of this process in memory now; 400 MB where the system does not say."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 400 << 20


def return_freed_memory(always: bool = False) -> None:
    """Let the C library give freed memory back to the system; where it is not glibc, nothing happens.

    always: also from now on: what takes 1 MiB or more is mapped apart, and unmapped when it is freed.  Else the library keeps freed blocks of up to
            32 MiB for later, and a run's peak is the sum of what was freed, not what was ever needed at once
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        if always:
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)


@dataclass(frozen=True)
class Work:
    """What is estimated from.

    tokens, batch_tokens: of calibration data, and of one forward pass of it; 0 without data
    eval_tokens:          of evaluation data
    values: bytes of one value while computing
    """

    tokens: int = 0
    batch_tokens: int = 0
    eval_tokens: int = 0
    values: int = 4


@dataclass(frozen=True)
class Footprint:
    """The parts of a run's peak memory, bytes.

    base:    the process before any weight
    whole:   the float model;  outside: of it what lies in no block;  block: the largest block, with its codes
    solve:   beside a block, while its largest weight is solved
    data:    hidden states and what one forward pass makes of them;  hidden: of these all samples' hidden states
    packed:  the quantized model
    """

    base: int
    whole: int
    outside: int
    block: int
    solve: int
    data: int
    hidden: int
    packed: int

    @property
    def in_memory(self) -> int:
        """With the whole model in memory: the float one for the reference, or the packed one while the last block is solved."""
        solving = self.outside + self.packed + self.block + self.solve + self.data + self.hidden
        return self.base + max(self.whole + self.data, solving, 2 * self.packed + self.data)

    @property
    def streamed(self) -> int:
        """With one block at a time."""
        return self.base + max(self.outside + self.block + self.data, self.block + self.solve + self.data)

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"in_memory": self.in_memory, "streamed": self.streamed}


@dataclass(frozen=True)
class Budget:
    """How a run uses memory.

    stream: one block in memory at a time
    keep:   bytes of outputs inside a block that may be kept
    smallest: the least limit that every plan of this run accepts
    """

    stream: bool
    keep: int
    limit: int | None
    footprint: Footprint
    smallest: int

    @property
    def estimate(self) -> int:
        """Bytes of peak memory."""
        return self.footprint.streamed if self.stream else self.footprint.in_memory

    def to_dict(self) -> dict[str, Any]:
        return {
            "streamed": self.stream,
            "estimate_bytes": self.estimate,
            "limit_bytes": self.limit,
            "smallest_bytes": self.smallest,
            "parts": self.footprint.to_dict(),
        }


def footprint(
    model: nn.Module,
    topology: Topology,
    solves: Sequence[tuple[Site, Shape, bool]],
    packed: int,
    work: Work,
) -> Footprint:
    """Estimate from a model on meta.

    solves: the weights that are solved: site, shape [N, K], whether from the Gram matrix of its inputs
    packed: bytes of the quantized model as stored
    """
    blocks = [(b, model.get_submodule(b.module)) for b in topology.blocks]
    inside = {id(p) for _, m in blocks for p in m.parameters()}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    largest = max((_count(m) for _, m in blocks), default=0)
    widths = [shape[1] for _, shape, _ in solves] + [shape[0] for _, shape, _ in solves]
    hidden = max((s[1] for _, s, _ in solves[:1]), default=0)
    wide = max(widths, default=0)
    vocabulary = max((p.shape[0] for p in model.parameters() if id(p) not in inside and p.ndim == 2), default=0)
    per_pass = work.values * work.batch_tokens * (4 * hidden + 3 * wide)
    logits = work.values * min(work.eval_tokens, 512) * 3 * vocabulary
    evaluated = 2 * work.values * work.eval_tokens * hidden
    return Footprint(
        base=resident_memory() + _LATER,
        whole=work.values * _count(model),
        outside=work.values * outside,
        block=(work.values + 1) * largest,
        solve=_solve_bytes(topology, solves),
        data=max(per_pass, logits + evaluated),
        hidden=2 * work.values * work.tokens * hidden,
        packed=packed,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _solve_bytes(topology: Topology, solves: Iterable[tuple[Site, Shape, bool]]) -> int:
    """Of the most demanding stage: its Gram matrices, and the solver's copies of its largest weight (of those together that share an input)."""
    rows = {site: (shape, gram) for site, shape, gram in solves}
    most = 0
    for block in topology.blocks:
        for stage in block.stages:
            own = [rows[s] for s in stage if s in rows]
            if not own:
                continue
            k = max(shape[1] for shape, _ in own)
            together = sum(prod(shape) for shape, gram in own) if any(gram for _, gram in own) else max(prod(shape) for shape, _ in own)
            gram = any(gram for _, gram in own)
            most = max(most, int(4 * (_SOLVE_WEIGHT * together + (_SOLVE_GRAM * k * k if gram else 0))))
    return most


def choose_budget(print_: Footprint, limit: int | None, *, streams: bool = True, wanted: bool = False, processes: int = 1) -> Budget:
    """Stream where the limit, or the memory that is free, does not hold the model.

    limit:   bytes; None = 80 % of what the machine can still give, divided by the processes
    streams: whether the model can be run block by block
    wanted:  whether to stream in any case
    """
    bound = limit
    if bound is None and (free := available_memory()) is not None:
        bound = int(0.8 * (free / processes + resident_memory()))
    stream = streams and (wanted or (bound is not None and print_.in_memory > bound))
    taken = print_.streamed if stream else print_.in_memory
    keep = _KEEP if bound is None else max(0, min(_KEEP, bound - taken))
    return Budget(stream, keep, limit, print_, _smallest(print_, streams))


def too_small(print_: Footprint, limit: int | None, *, streams: bool = True) -> str | None:
    """What is wrong with a limit, and the smallest that would do; None where it holds."""
    least = _least(print_, streams)
    if limit is None or least <= limit:
        return None
    why = "" if streams else " (the blocks of this model are not fed by the block before alone, so it cannot be streamed)"
    return (
        f"--max-ram {limit / 2**30:.2f}GiB is less than this run needs, an estimated {least / 2**30:.2f} GiB{why}; "
        f"the smallest that would do: --max-ram {_smallest(print_, streams) / 2**30:.2f}GiB"
    )


def _least(print_: Footprint, streams: bool) -> int:
    return print_.streamed if streams else print_.in_memory


def _smallest(print_: Footprint, streams: bool) -> int:
    """In whole twentieths of a GiB, above what another process may find."""
    step = 2**30 // 20
    return -(-(_least(print_, streams) + _NOISE) // step) * step
