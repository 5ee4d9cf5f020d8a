"""The layouts of compressed-tensors, the default for interchange: plain transformers and vLLM load them.

| packing | its `format` | tensors of a weight [N, K] |
|---|---|---|
| ct-pack | pack-quantized | weight_packed int32 [N, ceil(K·b/32)], code + 2^(b-1), low bits first; weight_scale; weight_shape int64 [2] |
| ct-int | int-quantized | weight int8 [N, K]; weight_scale |
| ct-float | float-quantized | weight float8_e4m3fn [N, K]; weight_scale |

weight_scale is [N, 1] per channel, [N, K/G] per group, [1] per tensor, [ceil(N/R), ceil(K/C)] per tile, in the spec's scale dtype.

Left out: zero points (transformers cannot load them on its default path), 3, 5, 6 and 7 bits (compressed-tensors changed their layout in 0.18 under
the same name), FP4 and MX (their packed loaders work in bfloat16 alone).  `bits` holds all of these.
Source: compressed-tensors 0.20, compressors/pack_quantized and compressors/naive_quantized.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from qkernels.int_pack import pack, unpack
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import FP8_E4M3, Int, Offset, PerChannel, PerGroup, PerTensor, QTensor, QuantSpec, Tile
from qcore.numbers.granularity import Shape, grid
from qcore.numbers.spec import SCALE_DTYPES
from qcore.packing.base import Packing, to_stored_scale


def _refuses_scales(spec: QuantSpec, shape: Shape, granularities: tuple[type, ...]) -> str | None:
    """What the three layouts have in common."""
    if len(shape) != 2:
        return f"needs a matrix [N, K], got shape {shape}"
    if spec.when == "dynamic":
        return "dynamic scales are computed at run time; there is nothing to store"
    if spec.offset is not Offset.NONE:
        return f"has no offset, got offset {spec.offset.value!r}: transformers loads symmetric weights alone"
    if not isinstance(spec.scale, str):
        return "needs scales in a float dtype, got scales with a spec of their own"
    if not isinstance(spec.granularity, granularities):
        return f"needs granularity {' or '.join(g.name for g in granularities)}, got {spec.granularity.name!r}"  # type: ignore[attr-defined]
    if isinstance(spec.granularity, PerChannel) and spec.granularity.axis not in (0, -2):
        return f"needs output channels (axis 0), got axis {spec.granularity.axis}"
    try:
        spec.check(shape)
    except SpecError as e:
        return str(e)
    return None


def _scale_to_disk(q: QTensor) -> Tensor:
    scale = to_stored_scale(q.parts["scale"], q.spec).contiguous()
    return scale.reshape(1) if isinstance(q.spec.granularity, PerTensor) else scale


def _scale_from_disk(parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> Tensor:
    assert isinstance(spec.scale, str), spec.scale
    blocks = grid(shape, spec.granularity.block(shape))
    stored = parts["weight_scale"]
    if stored.numel() != blocks[0] * blocks[1]:
        raise SpecError(f"weight_scale has shape {tuple(stored.shape)}, but {spec} of {shape} has {blocks} blocks")
    return stored.to(SCALE_DTYPES[spec.scale]).float().reshape(blocks)


class _Rows(Packing):
    """Rows can be cut out wherever a row has scales of its own, or all share one."""

    def rows(self, parts: Mapping[str, Tensor], index: Tensor, spec: QuantSpec, shape: Shape) -> dict[str, Tensor] | None:
        if isinstance(spec.granularity, Tile):
            return None
        shared = isinstance(spec.granularity, PerTensor)
        found = {name: t[index] for name, t in parts.items() if name in ("weight", "weight_packed")}
        found["weight_scale"] = parts["weight_scale"] if shared else parts["weight_scale"][index]
        return found


class CompressedPack(_Rows):
    """pack-quantized: symmetric integers of 2, 4 or 8 bits."""

    name: ClassVar[str] = "ct-pack"
    rank: ClassVar[int] = 100
    weight_only: ClassVar[bool] = True
    format: ClassVar[str] = "pack-quantized"

    def refuses(self, spec: QuantSpec, shape: Shape) -> str | None:
        if spec.format not in (Int(2), Int(4), Int(8)):
            return f"holds signed integers of 2, 4 or 8 bits, got {spec.format}"
        return _refuses_scales(spec, shape, (PerGroup, PerChannel))

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        bits = q.spec.format.bits
        unsigned = (q.codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
        return {
            "weight_packed": pack(unsigned, bits, torch.int32),
            "weight_scale": _scale_to_disk(q),
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }

    def unpack(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QTensor:
        bits = spec.format.bits
        try:
            unsigned = unpack(parts["weight_packed"], bits, shape[-1])
        except ValueError as e:
            raise SpecError(f"weight_packed does not fit its spec: {e}; compressed-tensors 0.17 and older packed otherwise") from e
        codes = (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        return QTensor(spec, {"codes": codes, "scale": _scale_from_disk(parts, spec, shape)}, shape)


class CompressedInt(_Rows):
    """int-quantized: 8-bit integers, one a byte."""

    name: ClassVar[str] = "ct-int"
    rank: ClassVar[int] = 110
    format: ClassVar[str] = "int-quantized"

    def refuses(self, spec: QuantSpec, shape: Shape) -> str | None:
        if spec.format != Int(8):
            return f"holds signed 8-bit integers, got {spec.format}"
        return _refuses_scales(spec, shape, (PerChannel, PerGroup, PerTensor))

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        return {"weight": q.codes.to(torch.int8).contiguous(), "weight_scale": _scale_to_disk(q)}

    def unpack(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QTensor:
        return QTensor(spec, {"codes": parts["weight"], "scale": _scale_from_disk(parts, spec, shape)}, shape)


class CompressedFloat(_Rows):
    """float-quantized: E4M3, one a byte."""

    name: ClassVar[str] = "ct-float"
    rank: ClassVar[int] = 120
    format: ClassVar[str] = "float-quantized"

    def refuses(self, spec: QuantSpec, shape: Shape) -> str | None:
        if spec.format != FP8_E4M3:
            return f"holds E4M3 floats, got {spec.format}"
        return _refuses_scales(spec, shape, (PerChannel, PerTensor, Tile))

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        return {"weight": q.codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": _scale_to_disk(q)}

    def unpack(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QTensor:
        return QTensor(spec, {"codes": parts["weight"].view(torch.uint8), "scale": _scale_from_disk(parts, spec, shape)}, shape)


def scheme_of_weight(spec: QuantSpec) -> dict[str, Any]:
    """The `weights` entry of a compressed-tensors scheme for a spec that one of the packings here accepts."""
    g = spec.granularity
    args: dict[str, Any] = {
        "num_bits": spec.format.bits,
        "type": "int" if isinstance(spec.format, Int) else "float",
        "symmetric": True,
        "strategy": "block" if isinstance(g, Tile) else g.name,
        "dynamic": False,
    }
    if isinstance(g, PerGroup):
        args["group_size"] = g.size
    if isinstance(g, Tile):
        args["block_structure"] = [g.rows, g.cols]
    return args
