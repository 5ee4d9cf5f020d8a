"""Kernels of y = x Ŵᵀ from torch's own products, and the reference.

| kernel | runs | rank | what it costs |
|---|---|---|---|
| torch-int8-dynamic-linear | int8 weights × int8 inputs per token, on CPU | 100 | no copy of the weight; exact sums |
| torch-int-linear | integers × integers of 2 to 8 bits, zero points, groups: `ops/int_linear.py` | 150 | a byte for each code; exact sums |
| torch-int4-linear | 4-bit groups, bfloat16 inputs, on CPU | 200 | a second copy of the codes, half a byte each |
| native-… | integers of 2 to 8 bits, on CPU | 50 | see `ops/native.py` |
| reference-linear | everything, everywhere | 1000 | N·K float32 values are made for each call |

A kernel may round otherwise than the reference, never more coarsely than the dtype of x: what would need more refuses.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from qkernels import int8_linear
from qkernels.dequant_linear import dequant_linear
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import Int, Offset, PerChannel, PerGroup, PerTensor, PerToken, QTensor, quantize
from qcore.numbers.tensor import per_value_params
from qcore.ops.activation import quantize_input, static_parts
from qcore.ops.kernel import Job, Kernel


def _unpacked(parts: Mapping[str, Tensor], job: Job) -> QTensor:
    assert job.unpack is not None, f"{job.op} on {job.packing!r} came without its packing's `unpack`"
    return job.unpack(parts)


def _sealed(job: Job) -> str | None:
    """These kernels run every packing, through its own way back; without that they know none."""
    return None if job.unpack is not None else f"the job does not say how packing {job.packing!r} is unpacked"


class ReferenceLinear(Kernel):
    """Give every code its value, then multiply: the meaning of the op.  The weight is rounded to x's dtype, as by a consumer that decompresses."""

    name: ClassVar[str] = "reference-linear"
    op: ClassVar[str] = "linear"
    rank: ClassVar[int] = 1000

    def refuses(self, job: Job) -> str | None:
        return _sealed(job)

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        q = _unpacked(parts, job)
        x = quantize_input(x, job.activation, static_parts(parts))
        fmt = q.spec.format
        values = fmt.decode(q.codes, per_value_params(q.spec, q.params(), q.shape)).reshape(q.shape)
        if not q.spec.scaled:
            return torch.nn.functional.linear(x, values.to(x.dtype))
        zero_point = q.parts["offset"] if q.spec.offset is Offset.CODE else None
        offset = q.parts["offset"] if q.spec.offset is Offset.VALUE else None
        return dequant_linear(x, values, q.scale(), q.block, zero_point, offset)  # type: ignore[arg-type]


class TorchInt8DynamicLinear(Kernel):
    """W8A8: int8 × int8 → int32, exact; the scales of token and channel are multiplied in float32 afterwards.

    The reference multiplies first and adds in the dtype of x, so the two agree to that dtype's rounding, and this one is the more exact.
    """

    name: ClassVar[str] = "torch-int8-dynamic-linear"
    op: ClassVar[str] = "linear"
    rank: ClassVar[int] = 100

    def refuses(self, job: Job) -> str | None:
        w, a = job.weight, job.activation
        if job.device.type != "cpu":
            return f"runs on cpu, got {job.device}"
        if not hasattr(torch, "_int_mm"):
            return "this torch has no _int_mm"
        if w.format != Int(8) or w.offset is not Offset.NONE or not isinstance(w.granularity, PerChannel | PerTensor):
            return f"needs symmetric 8-bit weights per channel or tensor, got {w}"
        if isinstance(w.granularity, PerChannel) and w.granularity.axis not in (0, -2):
            return f"needs scales of output channels (axis 0), got axis {w.granularity.axis}"
        if a is None or a.format != Int(8) or a.offset is not Offset.NONE or a.when != "dynamic" or not isinstance(a.granularity, PerToken):
            return f"needs dynamic symmetric 8-bit inputs per token, got {a or 'float inputs'}"
        if job.shape[1] >= 1 << 17:
            return f"an int32 sum holds fewer than {1 << 17} products, got K={job.shape[1]}"
        return _sealed(job)

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        q = _unpacked(parts, job)
        return {"codes": q.codes, "scale": q.scale().flatten()}  # [N, K] int8; [N], or [1] for a tensor scale

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        assert job.activation is not None
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], job.shape[0])
        rows = quantize(x.reshape(-1, x.shape[-1]), job.activation)
        y = int8_linear.cpu.int8_linear(rows.codes, parts["codes"], rows.scale(), parts["scale"])
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


class TorchInt4Linear(Kernel):
    """torch's own 4-bit product on CPU, which reads two codes a byte.

    It is fast for bfloat16 inputs alone (others run a loop that takes seconds), and holds scales in bfloat16; so it refuses all else.  Sums are
    float32: it agrees with the reference to the rounding of its bfloat16 output.
    """

    name: ClassVar[str] = "torch-int4-linear"
    op: ClassVar[str] = "linear"
    rank: ClassVar[int] = 200

    def refuses(self, job: Job) -> str | None:
        w = job.weight
        if job.device.type != "cpu":
            return f"runs on cpu, got {job.device}"
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            return "this torch has no _weight_int4pack_mm_for_cpu"
        if job.dtype is not torch.bfloat16:
            return f"needs bfloat16 inputs, got {str(job.dtype).removeprefix('torch.')}"
        if job.activation is not None:
            return f"needs float inputs, got {job.activation}"
        if w.format != Int(4) or w.offset is not Offset.NONE:
            return f"needs symmetric 4-bit integers, got {w}"
        if not isinstance(w.granularity, PerGroup) or w.granularity.size not in (32, 64, 128, 256):
            return f"needs groups of 32, 64, 128 or 256, got {w.granularity}"
        if w.scale != "bfloat16":
            return f"holds scales in bfloat16, which would move scales of {w.scale}"
        if job.shape[0] % 16:
            return f"needs N divisible by 16, got {job.shape[0]}"
        return _sealed(job)

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        q = _unpacked(parts, job)
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.codes.to(torch.int32) + 8, 1)
        scale = q.scale().to(torch.bfloat16)
        return {"codes": codes, "scale_and_zero": torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()}  # [K/G, N, 2]

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        if x.dtype is not torch.bfloat16:
            raise SpecError(f"{self.name} was bound for bfloat16 inputs, got {x.dtype}; convert the model with `.to(dtype)`, which binds anew")
        assert isinstance(job.weight.granularity, PerGroup)
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], job.shape[0])
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, parts["codes"], job.weight.granularity.size, parts["scale_and_zero"])
        return y.reshape(*x.shape[:-1], -1)
