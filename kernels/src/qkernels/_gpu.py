"""What the Triton kernels have in common: checks of their arguments, tile sizes, and what is compiled to prove them without a device."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkernels import _check
from qkernels._check import require_groups


@dataclass(frozen=True)
class Case:
    """One compilation of a kernel: what the report lists, and what must be in its assembly.

    signature: argument → Triton type, in order, without the constants
    mma:       it multiplies matrices, so tensor-core instructions have to be there
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    mma: bool
    warps: int = 4
    stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def require(name: str, t: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """As `_check.require`, and on a GPU."""
    _check.require(name, t, shape, dtypes, like)
    if t.device.type == "cpu" and not interpreting():
        raise ValueError(f"{name}: is on cpu; allowed: a GPU (or TRITON_INTERPRET=1 before the first import, for tests)")


def rows_of(x: Tensor) -> Tensor:
    """[..., K] → [T, K], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def block_of_group(groups: int, k: int, least: int, most: int = 64) -> int:
    """The largest power of two up to `most` that divides a group of the argument `scale`."""
    group = require_groups("scale", groups, k, least)
    size = most
    while group % size:
        size //= 2
    return size


def warps_of(rows: int) -> int:
    """Of a tile of so many rows and 64 columns; with 4, tiles of 64 rows hold all registers that a thread may have (tools/bench/triton_report.py)."""
    return 4 if rows <= 16 else 8
