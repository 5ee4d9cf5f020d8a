"""Several processes that quantize one model: who they are, and how they tell each other what they found.

    torchrun --nproc-per-node 2 -m qcore quantize MODEL --recipe w4a16-gptq -o out/

Calibration is data-parallel: process r of n runs the batches r, r + n, …; states of observers are merged in the order of the ranks.  The weights of
one stage are shared out, each solved by one process and handed to all.  Process 0 alone writes.  What comes out is what one process finds, but for
the order in which floating-point sums are taken.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

from qcore.errors import SpecError, Stopped

# process 0 saves, proves and evaluates nothing while others wait, but it computes the float reference first, which may take hours
PATIENCE = timedelta(days=7)


class Processes(Protocol):
    """The processes of one run.  rank: which one this is, 0 ≤ rank < count"""

    rank: int
    count: int

    def share(self, own: Any) -> list[Any]:
        """What every process brings, in the order of their ranks; all processes call it, in the same places.

        Stopped when another process is gone.
        """

    def part(self) -> None:
        """The common work is done; each goes on, or ends, by itself.  (Libraries that find a process group open expect all to call them.)"""
        return None

    def own(self, whole: Sequence[Any]) -> list[Any]:
        """The part of a sequence that this process works on: every count-th, from rank on."""
        return list(whole[self.rank :: self.count])

    def agreed(self, found: Any) -> Any:
        """What process 0 found: for what each could compute, but must not differ in a last digit."""
        return found if self.count == 1 else self.share(found if self.rank == 0 else None)[0]


class Alone(Processes):
    """One process."""

    rank, count = 0, 1

    def share(self, own: Any) -> list[Any]:
        return [own]


class Together(Processes):
    """Processes that torchrun started, by torch.distributed: gloo between CPUs, NCCL beside it where there are GPUs."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def share(self, own: Any) -> list[Any]:
        import torch.distributed as dist

        # objects are pickled between processes that this run started itself; nothing that comes from a file goes this way
        everything: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(everything, own)
        except RuntimeError as e:
            why = re.sub(r"^\[[^\]]*\]\s*", "", str(e).splitlines()[0]).partition(". ")[0]  # without the place in gloo's source
            raise Stopped(f"process {self.rank} of {self.count} lost the others: one of them ended ({why})") from e
        return everything

    def part(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def of_this_run() -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        raise SpecError("WORLD_SIZE is set but RANK or MASTER_ADDR is not; start several processes with torchrun, or unset WORLD_SIZE")
    team = Together()
    try:
        yield team
    finally:
        team.part()
