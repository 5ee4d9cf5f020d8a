"""Checks of arguments: a ValueError names the argument, what it is, and what is allowed."""

from types import EllipsisType

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
FLOATING = (*FLOATS, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


Shape = tuple[int | EllipsisType | None, ...]


def require(name: str, t: Tensor, shape: Shape, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """ValueError unless `t` fits.

    shape: None = any size of that axis; ... in front = any axes before
    like:  on the same device
    """
    if torch.jit.is_tracing():
        return  # sizes are not numbers there
    tail = tuple(n for n in shape if n is not ...)
    axes = t.dim() >= len(tail) if ... in shape else t.dim() == len(tail)
    have = tuple(t.shape[t.dim() - len(tail) :]) if axes else ()
    if not axes or any(want is not None and size != want for size, want in zip(have, tail, strict=True)) or t.dtype not in dtypes:
        allowed = ", ".join(_name(d) for d in dtypes)
        wanted = ", ".join("..." if n is ... else "any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: has shape {list(t.shape)}, {_name(t.dtype)}; allowed: [{wanted}] of {allowed}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name}: is on {t.device}; allowed: {like.device}, where the first argument is")


def require_one(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """ValueError unless `t` is one number, of any shape."""
    if t.numel() != 1 or t.dtype not in dtypes:
        allowed = ", ".join(_name(d) for d in dtypes)
        raise ValueError(f"{name}: has shape {list(t.shape)}, {_name(t.dtype)}; allowed: one number of {allowed}")
    if t.device != like.device:
        raise ValueError(f"{name}: is on {t.device}; allowed: {like.device}, where the first argument is")


def require_groups(name: str, groups: int, k: int, multiple: int = 1) -> int:
    """How many inputs a group has; ValueError unless groups are alike and of a multiple of so many."""
    if groups == 0 or k % groups:
        raise ValueError(f"{name}: has {groups} groups; allowed: a divisor of K={k}")
    if k // groups % multiple:
        raise ValueError(f"{name}: has {groups} groups of {k // groups} inputs; allowed: groups of multiples of {multiple}")
    return k // groups


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """ValueError unless `value` is one of those."""
    if value not in allowed:
        names = ", ".join(_name(a) if isinstance(a, torch.dtype) else str(a) for a in allowed)
        raise ValueError(f"{name}: got {_name(value) if isinstance(value, torch.dtype) else value}; allowed: {names}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
