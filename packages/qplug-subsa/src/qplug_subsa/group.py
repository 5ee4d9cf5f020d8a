"""The processes that share a pool: one, or those of torch.distributed."""

from typing import Any

import numpy as np

from qplug_subsa.rows import Array


class Group:
    """One process alone: every reduction is its own argument.

    offset: global index of this process's first row
    """

    rank: int = 0
    size: int = 1
    offset: int = 0

    def sum(self, array: Array) -> Array:
        return array

    def max(self, value: float) -> float:
        return value

    def min(self, value: int) -> int:
        return value


ALONE = Group()


class Distributed(Group):
    """The ranks of an initialized torch.distributed process group; rank r holds the rows after those of the ranks before it.

    rows: how many rows this rank holds
    """

    def __init__(self, rows: int, process_group: Any = None) -> None:
        import torch
        import torch.distributed as dist

        self._torch, self._dist, self._group = torch, dist, process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor(rows), group=process_group)
        self.offset = sum(int(c) for c in counts[: self.rank])

    def sum(self, array: Array) -> Array:
        value = self._torch.from_numpy(np.array(array, np.float64))
        self._dist.all_reduce(value, group=self._group)
        return value.numpy()

    def max(self, value: float) -> float:
        return float(self._reduced(self._torch.tensor(value, dtype=self._torch.float64), self._dist.ReduceOp.MAX))

    def min(self, value: int) -> int:
        return int(self._reduced(self._torch.tensor(value, dtype=self._torch.int64), self._dist.ReduceOp.MIN))

    def _reduced(self, value: Any, op: Any) -> Any:
        self._dist.all_reduce(value, op=op, group=self._group)
        return value
