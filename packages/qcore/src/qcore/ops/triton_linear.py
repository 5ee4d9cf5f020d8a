"""Kernels of y = x Ŵᵀ on a GPU (CUDA or HIP), by the Triton kernels of qkernels.

| kernel | weights | inputs | differs from the reference by |
|---|---|---|---|
| triton-weight-linear | integers of 2 to 8 bits in groups | float16, bfloat16 | the weight is rounded to the inputs' dtype, as there; float32 sums |
| triton-int8-linear | the same | rounded to int8, because the layer's activation spec says so | int32 sums in a group, float32 over groups |
| triton-fp4-linear | MXFP4, NVFP4 | float16, bfloat16 | as triton-weight-linear |

Weights are held in words of 32 bits (a second copy of the codes, which is not saved).  They are chosen before all others, on a GPU alone.  A layer of
experts calls one kernel for each, unless a plug-in groups them (qplug-llm's `use_grouped`).  None of them has run on a GPU yet; kernels/README.md
says what is proven without one.
"""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from qkernels import int_pack
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import FP4_E2M1, FP8_E4M3, Int, Offset, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from qcore.numbers.formats import PowerOfTwo
from qcore.numbers.spec import SCALE_DTYPES
from qcore.ops.activation import PREFIX
from qcore.ops.kernel import Job, Kernel
from qcore.ops.linear import ReferenceLinear

WORDS, SCALE, SHIFT, TENSOR_SCALE = "triton.words", "triton.scale", "triton.shift", "triton.tensor_scale"
HALVES = (torch.float16, torch.bfloat16)


def _refuses_place(job: Job) -> str | None:
    if job.device.type != "cuda":
        return f"runs on a GPU, got {job.device}" + ("" if torch.cuda.is_available() else ", and no CUDA or HIP device is here")
    if find_spec("triton") is None:
        return "triton is not installed; install qcore-kernels[triton]"
    return None if job.unpack is not None else f"the job does not say how packing {job.packing!r} is unpacked"


def _word_bits(spec: QuantSpec) -> int:
    return 4 if spec.format.bits <= 4 else 8


@cache
def _refuses_integers(spec: QuantSpec, shape: tuple[int, ...], least: int) -> str | None:
    """least: what groups have to be a multiple of, the least block that a tensor core takes"""
    if not isinstance(spec.format, Int) or not 2 <= spec.format.bits <= 8:
        return f"needs integers of 2 to 8 bits, got {spec}"
    g = spec.granularity
    if not isinstance(g, PerGroup | PerChannel | PerTensor) or (isinstance(g, PerChannel) and g.axis not in (0, -2)):
        return f"needs scales per group, output channel or tensor, got {g}"
    group = g.block(shape)[1]
    return f"needs groups of a multiple of {least} inputs, got {group}" if group % least else None


def _needs_the_reference(x: Tensor) -> bool:
    """Shapes alone (meta), gradients of the input, and programs that are written down to run elsewhere."""
    return x.device.type == "meta" or (x.requires_grad and torch.is_grad_enabled()) or torch.jit.is_tracing() or torch.compiler.is_exporting()


class TritonWeightLinear(Kernel):
    """Float inputs; a tile of the weight is decoded in registers and multiplied on the tensor cores."""

    name: ClassVar[str] = "triton-weight-linear"
    op: ClassVar[str] = "linear"
    rank: ClassVar[int] = 30
    least: ClassVar[int] = 16

    def refuses(self, job: Job) -> str | None:
        return _refuses_place(job) or self._refuses_inputs(job) or _refuses_integers(job.weight, job.shape, self.least)

    def _refuses_inputs(self, job: Job) -> str | None:
        if job.activation is not None:
            return f"needs float inputs, got {job.activation}"
        return None if job.dtype in HALVES else f"needs float16 or bfloat16 inputs, got {str(job.dtype).removeprefix('torch.')}"

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        assert job.unpack is not None
        q, spec, bits = job.unpack(parts), job.weight, _word_bits(job.weight)
        n, k = job.shape
        fmt = spec.format
        assert isinstance(fmt, Int)
        scale = q.scale() if isinstance(spec.scale, QuantSpec) else q.scale().to(SCALE_DTYPES[spec.scale])
        scale = scale.expand(n, k // spec.granularity.block(job.shape)[1]).contiguous()
        # words hold signed codes, raised: what unsigned ones are moved down by goes into the shift
        below = 0 if fmt.signed else 1 << (fmt.bits - 1)
        raised = q.codes.to(torch.int32) - below + (1 << (bits - 1))
        found = {WORDS: int_pack.pack(raised, bits, torch.int32), SCALE: scale}
        if spec.offset is Offset.CODE:
            found[SHIFT] = (below - q.parts["offset"].float()) * scale.float()
        elif spec.offset is Offset.VALUE or below:
            found[SHIFT] = below * scale.float() + (q.parts["offset"].float() if spec.offset is Offset.VALUE else 0)
        if SHIFT in found:
            found[SHIFT] = found[SHIFT].expand_as(scale).contiguous()
        return dict(parts) | found

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        if _needs_the_reference(x):
            return ReferenceLinear()(x, parts, job)
        try:
            return self._run(x, parts, job)
        except ValueError as e:
            raise SpecError(f"{self.name}: {e}") from e

    def _run(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        from qkernels.weight_linear import triton

        return triton.weight_linear(x, parts[WORDS], parts[SCALE], parts.get(SHIFT), bits=_word_bits(job.weight))


class TritonInt8Linear(TritonWeightLinear):
    """Inputs rounded to int8, per token or with one stored scale, as the layer's activation spec says; int8 tensor cores.

    Inputs are taken to be finite: looking for others would cost a wait for the device.
    """

    name: ClassVar[str] = "triton-int8-linear"
    least: ClassVar[int] = 32

    def _refuses_inputs(self, job: Job) -> str | None:
        a = job.activation
        if a is None or a.format != Int(8) or a.offset is not Offset.NONE:
            return f"needs symmetric 8-bit inputs, got {a or 'float inputs'}"
        if a.when == "dynamic":
            return None if isinstance(a.granularity, PerToken) else f"needs dynamic scales per token, got {a}"
        if not isinstance(a.granularity, PerTensor) or isinstance(a.scale, QuantSpec):
            return f"needs one static scale for all inputs, got {a}"
        return None

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        found = super().prepare(parts, job)
        if job.activation is not None and job.activation.when == "static" and PREFIX + "scale" not in found:
            raise SpecError(f"{job.activation} is static, but its scale was not given; calibrate, or use when='dynamic'")
        return found

    def _run(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        from qkernels.int_linear import triton
        from qkernels.quantize_rows import triton as rows

        q, x_scale = rows.quantize_rows(x.reshape(-1, x.shape[-1]), parts.get(PREFIX + "scale"))
        y = triton.int_linear(q, x_scale, parts[WORDS], parts[SCALE], parts.get(SHIFT), bits=_word_bits(job.weight), dtype=x.dtype)
        return y.reshape(*x.shape[:-1], job.shape[0])


class TritonFp4Linear(TritonWeightLinear):
    """FP4 elements under E8M0 scales of 32 (MXFP4), or under E4M3 scales of 16 and one float32 (NVFP4)."""

    name: ClassVar[str] = "triton-fp4-linear"

    def refuses(self, job: Job) -> str | None:
        return _refuses_place(job) or self._refuses_inputs(job) or _refuses_fp4(job.weight, job.shape)

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        assert job.unpack is not None
        q = job.unpack(parts)
        found = {WORDS: q.codes[:, 0::2] | (q.codes[:, 1::2] << 4), SCALE: q.parts["scale.codes"].contiguous()}
        if "scale.scale" in q.parts:
            found |= {SCALE: found[SCALE].view(torch.float8_e4m3fn), TENSOR_SCALE: q.parts["scale.scale"].float().reshape(())}
        return dict(parts) | found

    def _run(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        from qkernels.fp4_linear import triton

        return triton.fp4_linear(x, parts[WORDS], parts[SCALE], parts.get(TENSOR_SCALE))


@cache
def _refuses_fp4(spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
    inner, g = spec.scale, spec.granularity
    mx = isinstance(inner, QuantSpec) and isinstance(inner.format, PowerOfTwo) and g == PerGroup(32)
    nv = (
        isinstance(inner, QuantSpec)
        and inner.format == FP8_E4M3
        and inner.granularity == PerTensor()
        and inner.scale == "float32"
        and g == PerGroup(16)
    )
    if spec.format != FP4_E2M1 or spec.offset is not Offset.NONE or not (mx or nv):
        return f"needs MXFP4 or NVFP4, got {spec}"
    group = 32 if mx else 16
    return f"needs K to be a multiple of {group}, got {shape[1]}" if shape[1] % group else None


TRITON_KERNELS = (TritonWeightLinear, TritonInt8Linear, TritonFp4Linear)
