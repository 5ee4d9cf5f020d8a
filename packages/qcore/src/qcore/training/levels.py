"""Formats whose numbers lie at even distances, as integers: what their codes mean is asked of the format, never known by its name."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from qcore.errors import SpecError
from qcore.numbers import NumberFormat
from qcore.packing.dense import code_dtype

MOST_BITS = 16


@dataclass(frozen=True)
class Levels:
    """The numbers of a format at scale 1: spacing · i for the integers i from `lowest` to `highest`, zero among them.

    truncates: whether the format drops what lies behind a level (towards zero) instead of rounding to the nearest, ties to even
    """

    lowest: int
    highest: int
    spacing: float
    truncates: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.lowest >= -128 and self.highest <= 127 else torch.int32


def levels_of(fmt: NumberFormat) -> Levels:
    """How a format's numbers are integers; SpecError where they are not (minifloats, codebooks, BBFP)."""
    return _levels_of(fmt)  # type: ignore[arg-type]  # formats are frozen dataclasses, and so hashable


@lru_cache(maxsize=64)
def _levels_of(fmt: Any) -> Levels:
    if fmt.parts or fmt.dim != 1 or fmt.bits > MOST_BITS:
        raise SpecError(f"{fmt} has fitted parts, vectors or more than {MOST_BITS} bits; products of integers want fixed, evenly spaced numbers")
    half, signed = 1 << (fmt.bits - 1), code_dtype(fmt) == torch.int8  # int8 codes are two's complement, all others patterns
    values = fmt.decode(torch.arange(-half, half).to(torch.int8) if signed else torch.arange(2 * half)).double().unique()
    apart = values.diff()
    if not torch.isfinite(values).all() or len(values) < 3 or not bool((values == 0).any()) or bool((apart != apart[0]).any()):
        raise SpecError(
            f"the numbers of {fmt} do not lie at even distances around zero, so that its products are none of integers; "
            "take 'int', or 'bfp' (block floating point, from qplug-hardware)"
        )
    spacing = float(apart[0])
    probe = fmt.decode(fmt.encode(torch.tensor([0.75 * spacing])))
    return Levels(round(float(values[0]) / spacing), round(float(values[-1]) / spacing), spacing, truncates=float(probe) == 0.0)
