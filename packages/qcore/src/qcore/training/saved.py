"""What a backward pass keeps of its forward pass: coded rows, as tensors that take exactly the bits of their codes; and a measure of what is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from qkernels.int_pack import pack, sign_extend, unpack
from torch import Tensor

from qcore.numbers import QuantSpec
from qcore.packing.dense import code_dtype
from qcore.training.levels import levels_of
from qcore.training.rows import CodedRows

Keep = Literal["packed", "bytes"]


@dataclass(frozen=True)
class SavedRows:
    """Coded rows on their way through `save_for_backward`.

    tensors: "levels" and the scale's parts
    keep:    "packed": levels and exponents take exactly their bits (6 + 5/32 a value for GSE-INT6).  "bytes": one or four bytes each, quicker
    """

    spec: QuantSpec
    groups: tuple[int, int]
    columns: int
    keep: Keep
    tensors: dict[str, Tensor]

    def rows(self, tensors: dict[str, Tensor] | None = None) -> CodedRows:
        """The rows again.  tensors: what came back through autograd; None = `self.tensors`"""
        found = dict(self.tensors if tensors is None else tensors)
        count, size = self.groups
        levels = found.pop("levels")
        if self.keep == "packed":
            wide, bits = levels_of(self.spec.format).dtype, _level_bits(self.spec)
            levels = sign_extend(unpack(levels, bits, count * size), bits).to(wide).unflatten(-1, (count, size))
            if (exponent := _exponent(self.spec)) is not None:
                bits, dtype = exponent
                found["scale.codes"] = unpack(found["scale.codes"], bits, count).to(dtype)
        return CodedRows(self.spec, levels, found, self.columns)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def save_rows(rows: CodedRows, keep: Keep = "packed") -> SavedRows:
    """Coded rows as the tensors that are kept."""
    levels, scale = rows.levels, dict(rows.scale)
    if keep == "packed":
        levels = pack(levels.flatten(1), _level_bits(rows.spec))
        if (exponent := _exponent(rows.spec)) is not None:
            scale["scale.codes"] = pack(scale["scale.codes"], exponent[0])
    count, size = rows.levels.shape[1:]
    return SavedRows(rows.spec, (count, size), rows.columns, keep, {"levels": levels} | scale)


def _level_bits(spec: QuantSpec) -> int:
    """Bits of a level in two's complement; not more than the format's own."""
    level = levels_of(spec.format)
    return max((-level.lowest - 1).bit_length(), level.highest.bit_length()) + 1


def _exponent(spec: QuantSpec) -> tuple[int, torch.dtype] | None:
    """(bits, dtype) of the scales' own codes, where scales are codes."""
    inner = spec.scale
    return (inner.format.bits, code_dtype(inner.format)) if isinstance(inner, QuantSpec) else None


@dataclass
class SavedBytes:
    """What autograd keeps: each storage once, however many nodes share it."""

    storages: dict[int, int] = field(default_factory=dict)
    _held: list[Tensor] = field(default_factory=list)  # so that no address is used twice while counting

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@contextmanager
def counting_saved(*besides: Tensor) -> Iterator[SavedBytes]:
    """Count the bytes that a forward pass inside keeps for its backward pass.

    besides: tensors that are there anyway (parameters, buffers): their storages do not count
    """
    seen = SavedBytes()
    there = {t.untyped_storage().data_ptr() for t in besides}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in there:
            seen.storages[storage.data_ptr()] = storage.nbytes()
            seen._held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield seen
