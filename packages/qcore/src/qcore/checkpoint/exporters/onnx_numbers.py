"""Stored weights and static inputs as ONNX Runtime's integers: unsigned inputs, weights that cannot saturate, biases that fit int32."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import Int, Offset, PerChannel, PerTensor, QTensor, QuantSpec
from qcore.ops.activation import PREFIX

_INT16 = (-(1 << 15), (1 << 15) - 1)
_LARGEST_BIAS = 1 << 30


@dataclass(frozen=True)
class InputCodes:
    """uint8 codes of a layer's input: value = (code - zero) · scale."""

    scale: float
    zero: int


@dataclass(frozen=True)
class WeightCodes:
    """One layer's constants.

    codes: [N, K] int8, or uint8 with the zero point 128
    scale: [N] float32
    bias:  [N] int32 in units of scale · input scale, or None
    """

    codes: Tensor
    scale: Tensor
    zero: int
    bias: Tensor | None


def weight_problem(spec: QuantSpec) -> str | None:
    """Why a weight of this spec has no place in QuantizeLinear and DequantizeLinear per axis; None where it has."""
    if not isinstance(spec.format, Int) or not spec.format.signed or not 2 <= spec.format.bits <= 8:
        return f"weights are integers of 2 to 8 bits, got {spec.format}"
    if spec.offset is not Offset.NONE or isinstance(spec.scale, QuantSpec):
        return f"weights are symmetric, with plain scales, got {spec}"
    if not isinstance(spec.granularity, PerTensor) and not (isinstance(spec.granularity, PerChannel) and spec.granularity.axis in (0, -2)):
        return f"weights have a scale per output channel (axis 0) or tensor, got {spec.granularity}"
    return None


def input_problem(spec: QuantSpec | None) -> str | None:
    """Why an input of this spec cannot be written; None where it can.  Float inputs (None) can."""
    if spec is None:
        return None
    if spec.when != "static":
        return f"inputs have static scales, got {spec}; quantize with a recipe such as cnn-w8a8"
    if not isinstance(spec.format, Int) or spec.format.bits != 8 or not isinstance(spec.granularity, PerTensor) or spec.offset is Offset.VALUE:
        return f"inputs are 8-bit integers with one scale for the tensor, got {spec}"
    return None


def input_codes(parts: Mapping[str, Tensor], spec: QuantSpec) -> InputCodes:
    """Signed codes become unsigned ones 128 higher: the same numbers."""
    zero = int(parts[PREFIX + "offset"].item()) if spec.offset is Offset.CODE else 0
    signed = isinstance(spec.format, Int) and spec.format.signed
    return InputCodes(float(parts[PREFIX + "scale"].item()), zero + (128 if signed else 0))


def saturates(codes: Tensor) -> bool:
    """Whether some uint8 inputs make the sum of two products of a row leave 16 bits.  codes: [N, K] int8

    `vpmaddubsw`, which ONNX Runtime and oneDNN use on processors with AVX2 or AVX-512 but without VNNI, adds two neighbouring products uint8 × int8
    in 16 bits and saturates.  Which inputs are neighbours is the kernel's affair, so any two of a row count.
    """
    rows = codes.int()
    if rows.shape[1] == 1:
        rows = torch.cat([rows, torch.zeros_like(rows)], 1)
    high = rows.clamp(min=0).topk(2, 1).values.sum(1)
    low = rows.clamp(max=0).topk(2, 1, largest=False).values.sum(1)
    return bool((255 * high > _INT16[1]).any() or (255 * low < _INT16[0]).any())


def weight_codes(q: QTensor, bias: Tensor | None, inputs: InputCodes | None, form: str) -> WeightCodes:
    """The constants of one layer.

    form: "int8"; "uint8": codes 128 higher, whose products are added in 32 bits everywhere; "auto": uint8 where int8 could saturate

    Negative scales change sign together with their codes.  Where a bias in units of scale · input scale would not fit int32 (a channel whose weights
    have decayed to nothing beside its bias), the channel's scale is raised until it does: what its weights lose is below 2^-30 of the bias each.
    """
    scale = q.scale().flatten().double().expand(q.shape[0]).clone()
    codes = q.codes.int()
    if bool((scale < 0).any()):
        flipped = (scale < 0).unsqueeze(1)
        if bool((flipped & (codes == -128)).any()):
            raise SpecError("a negative scale with the code -128 has no int8 twin; solve with signed_scale = false")
        codes, scale = torch.where(flipped, -codes, codes), scale.abs()
    whole = None
    if inputs is not None and bias is not None:
        need = bias.double().abs() / (inputs.scale * _LARGEST_BIAS)
        raised = torch.maximum(scale, need)
        codes = torch.where((raised > scale).unsqueeze(1), (codes * (scale / raised).unsqueeze(1)).round().int(), codes)
        scale = raised.float().double()
        whole = (bias.double() / (scale * inputs.scale)).round().to(torch.int32)
    unsigned = form == "uint8" or (form == "auto" and saturates(codes.to(torch.int8)))
    stored = (codes + 128).to(torch.uint8) if unsigned else codes.to(torch.int8)
    return WeightCodes(stored, scale.float(), 128 if unsigned else 0, whole)
