"""`bits`: the general packing.  Any spec, no wasted bit in a row, nothing changed.

| stored part | what | how |
|---|---|---|
| codes | one per value (or per vector) | format.bits each, least significant bit first along the row, rows start on a byte; uint8 |
| scale | one per block | the spec's scale dtype |
| scale__codes, scale__scale … | where scales have a spec of their own | the same rules, recursively |
| offset | one per block | integer zero points as codes; float offsets in the scale's dtype |
| codebook … | the format's fitted parts | as they are |
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from qkernels.int_pack import pack, sign_extend, unpack
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import Codebook, Float, Int, NumberFormat, Offset, PowerOfTwo, QTensor, QuantSpec
from qcore.numbers.granularity import Shape, grid
from qcore.numbers.spec import SCALE_DTYPES
from qcore.packing.base import Packing, to_stored_scale

NESTED = "scale__"  # parts of a scale that has a spec; buffers of a module may not have dots in their names


def code_dtype(fmt: NumberFormat) -> torch.dtype:
    """The dtype of a format's codes in memory: what it declares as `code_dtype`, else what it gives for a few numbers."""
    own = getattr(fmt, "code_dtype", None)
    if own is not None:
        return own
    if isinstance(fmt, Int | Float | PowerOfTwo | Codebook):  # known without fitting anything
        if isinstance(fmt, Int) and fmt.signed:
            return torch.int8
        return torch.uint8 if fmt.bits <= 8 else torch.int16
    return _probed(fmt)  # type: ignore[arg-type]  # formats are frozen dataclasses


@lru_cache(maxsize=256)
def _probed(fmt: Any) -> torch.dtype:
    """Of the codes that a format of a plug-in gives for numbers between -1 and 1."""
    x = torch.linspace(-1, 1, 64 * fmt.dim).reshape((1, 64, fmt.dim) if fmt.dim > 1 else (1, 64))
    params = {name: part[0] for name, part in fmt.fit(x).items()}
    return fmt.encode(x[0], params).dtype


def _pack_codes(codes: Tensor, fmt: NumberFormat) -> Tensor:
    want = code_dtype(fmt)
    if codes.dtype != want:
        raise SpecError(f"codes of {fmt} are {codes.dtype}, expected {want}; give the format a class attribute `code_dtype` if it means otherwise")
    if not codes.is_meta and codes.numel():
        low, high = (int(v) for v in codes.aminmax())
        bottom, top = (-(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1) if want.is_signed and low < 0 else (0, (1 << fmt.bits) - 1)
        if low < bottom or high > top:
            raise SpecError(f"codes of {fmt} run from {low} to {high}, which {fmt.bits} bits cannot hold ({bottom} … {top})")
    return pack(codes, fmt.bits)


def _unpack_codes(packed: Tensor, fmt: NumberFormat, count: int) -> Tensor:
    try:
        codes = unpack(packed, fmt.bits, count)
    except ValueError as e:
        raise SpecError(f"the stored codes do not fit their spec: {e}") from e
    dtype = code_dtype(fmt)
    return (sign_extend(codes, fmt.bits) if dtype == torch.int8 else codes).to(dtype)


class Bits(Packing):
    """Holds every spec with static scales, of tensors of any rank."""

    name: ClassVar[str] = "bits"
    rank: ClassVar[int] = 1000

    def refuses(self, spec: QuantSpec, shape: Shape) -> str | None:
        if spec.when == "dynamic":
            return "dynamic scales are computed at run time; there is nothing to store"
        if not 1 <= spec.format.bits <= 16:
            return f"codes have 1 to 16 bits, got {spec.format.bits}"
        try:
            spec.check(shape)
        except SpecError as e:
            return str(e)
        return None

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        spec, parts = q.spec, {"codes": _pack_codes(q.codes, q.spec.format)}
        if spec.scaled and isinstance(spec.scale, QuantSpec):
            parts |= {NESTED + name: part for name, part in self.pack(q._scale_tensor()).items()}
        elif spec.scaled:
            parts["scale"] = to_stored_scale(q.parts["scale"], spec)
        if spec.offset is Offset.CODE:
            parts["offset"] = _pack_codes(q.parts["offset"], spec.format)
        elif spec.offset is Offset.VALUE:
            parts["offset"] = q.parts["offset"].float() if isinstance(spec.scale, QuantSpec) else to_stored_scale(q.parts["offset"], spec, "offset")
        return parts | {name: q.parts[name].contiguous() for name in spec.format.parts}

    def unpack(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QTensor:
        fmt = spec.format
        found = {"codes": _unpack_codes(parts["codes"], fmt, shape[-1] // fmt.dim)}
        if spec.scaled:
            blocks = grid(shape, spec.granularity.block(shape))
            if isinstance(spec.scale, QuantSpec):
                own = {k.removeprefix(NESTED): t for k, t in parts.items() if k.startswith(NESTED)}
                found |= {f"scale.{name}": part for name, part in self.unpack(own, spec.scale, blocks).parts.items()}
            else:
                found["scale"] = parts["scale"].to(SCALE_DTYPES[spec.scale]).float()
            if spec.offset is Offset.CODE:
                found["offset"] = _unpack_codes(parts["offset"], fmt, blocks[-1])
            elif spec.offset is Offset.VALUE:
                found["offset"] = parts["offset"].float()
        return QTensor(spec, found | {name: parts[name] for name in fmt.parts}, shape)

    def rows(self, parts: Mapping[str, Tensor], index: Tensor, spec: QuantSpec, shape: Shape) -> dict[str, Tensor] | None:
        block = spec.granularity.block(shape)
        if block[0] not in (1, shape[0]):
            return None
        by_row = block[0] == 1
        found = {"codes": parts["codes"][index]}
        if spec.scaled and isinstance(spec.scale, QuantSpec):
            own = {k.removeprefix(NESTED): t for k, t in parts.items() if k.startswith(NESTED)}
            inner = self.rows(own, index, spec.scale, grid(shape, block)) if by_row else own
            if inner is None:
                return None
            found |= {NESTED + name: part for name, part in inner.items()}
        elif spec.scaled:
            found["scale"] = parts["scale"][index] if by_row else parts["scale"]
        if spec.offset is not Offset.NONE:
            found["offset"] = parts["offset"][index] if by_row else parts["offset"]
        by_row = by_row and spec.format.per_block
        return found | {n: parts[n][index] if by_row and n not in spec.format.shared else parts[n] for n in spec.format.parts}
