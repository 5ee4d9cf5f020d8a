"""Kernels of y = x Ŵᵀ in C++ (`qkernels.native`), for integer weights of up to 8 bits on the CPU.

| kernel | inputs | sums | agrees with the reference |
|---|---|---|---|
| native-weight-linear | float, as they come | float32 | to the rounding of float32 sums, or of the inputs' dtype where that is coarser |
| native-int8-linear | int8, because the layer's activation spec says so | int32 in a group, float32 over groups | the same |
| native-int8-by-wish | float, rounded to int8 per token | as above | **no**: the inputs lose what does not fit 8 bits; only for `wish` |

All three hold a second copy of the codes in panels (`qkernels.panels`), half a byte or a byte each; it is not saved.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
from qkernels import native, panels
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import Int, Offset, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, int_activation
from qcore.numbers.spec import SCALE_DTYPES
from qcore.ops.activation import PREFIX
from qcore.ops.kernel import Job, Kernel
from qcore.ops.linear import ReferenceLinear

CODES, SCALE, SHIFT = "native.codes", "native.scale", "native.shift"


def _panel_bits(spec: QuantSpec) -> int:
    return 4 if spec.format.bits <= 4 else 8


def _group(job: Job) -> int:
    return job.weight.granularity.block(job.shape)[1]


@cache
def _refuses_weight(spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
    if not isinstance(spec.format, Int) or not 2 <= spec.format.bits <= 8:
        return f"needs integers of 2 to 8 bits, got {spec.format}"
    g = spec.granularity
    if not isinstance(g, PerGroup | PerChannel | PerTensor) or (isinstance(g, PerChannel) and g.axis not in (0, -2)):
        return f"needs scales per group, output channel or tensor, got {g}"
    step, group = 32 // _panel_bits(spec), g.block(shape)[1]
    if group % step:
        return f"needs groups of a multiple of {step} inputs, got {group}"
    return None


def _needs_the_reference(x: Tensor) -> bool:
    """Shapes alone (meta), gradients of the input, and programs that are written down to run elsewhere: it is made of torch's own operators."""
    return (
        x.device.type != "cpu"
        or (x.requires_grad and torch.is_grad_enabled())
        or torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or (type(x) not in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling())
    )


class NativeWeightLinear(Kernel):
    """Float inputs; the weight is decoded in registers, group by group, and never stored as floats."""

    name: ClassVar[str] = "native-weight-linear"
    op: ClassVar[str] = "linear"
    rank: ClassVar[int] = 50
    int8_inputs: ClassVar[bool] = False

    def refuses(self, job: Job) -> str | None:
        return self._refuses_inputs(job) or self._refuses_place(job) or _refuses_weight(job.weight, job.shape)

    def _refuses_inputs(self, job: Job) -> str | None:
        return None if job.activation is None else f"needs float inputs, got {job.activation}"

    def _refuses_place(self, job: Job) -> str | None:
        if job.device.type != "cpu":
            return f"runs on cpu, got {job.device}"
        if job.unpack is None:
            return f"the job does not say how packing {job.packing!r} is unpacked"
        if job.dtype not in native.TYPES:
            return f"takes inputs of {native.FLOATS}, got {str(job.dtype).removeprefix('torch.')}"
        return native.why_not()

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        assert job.unpack is not None
        q, spec = job.unpack(parts), job.weight
        n, k = job.shape
        fmt = spec.format
        assert isinstance(fmt, Int)
        scale = q.scale() if isinstance(spec.scale, QuantSpec) else q.scale().to(SCALE_DTYPES[spec.scale])
        scale = scale.expand(n, k // _group(job))
        # panels hold signed codes: unsigned ones are moved down, and what that takes away goes into the shift
        below = 0 if fmt.signed else 1 << (fmt.bits - 1)
        codes = q.codes if fmt.signed else (q.codes.to(torch.int16) - below).to(torch.int8)
        shift: Tensor | None = None
        if spec.offset is Offset.CODE:
            shift = (below - q.parts["offset"].float()) * scale.float()
        elif spec.offset is Offset.VALUE or below:
            shift = below * scale.float() + (q.parts["offset"].float() if spec.offset is Offset.VALUE else 0)
        laid = panels.pack(codes, scale, None if shift is None else shift.expand_as(scale), bits=_panel_bits(spec))
        found = {CODES: laid.codes, SCALE: laid.scale}
        return dict(parts) | found | ({} if laid.shift is None else {SHIFT: laid.shift})

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        if _needs_the_reference(x):
            return ReferenceLinear()(x, parts, job)
        x_scale = parts.get(PREFIX + "scale") if self.int8_inputs else None
        if torch.compiler.is_compiling():
            n, k = job.shape
            weight = parts[CODES], parts[SCALE], parts.get(SHIFT)
            return native.compiled_linear(x, *weight, n, k, _group(job), _panel_bits(job.weight), self.int8_inputs, x_scale)
        try:
            return native.linear(
                x,
                parts[CODES],
                parts[SCALE],
                parts.get(SHIFT),
                job.shape,  # type: ignore[arg-type]
                _group(job),
                _panel_bits(job.weight),
                int8_inputs=self.int8_inputs,
                x_scale=x_scale,
            )
        except ValueError as e:
            raise SpecError(f"{self.name}: {e}") from e


class NativeInt8Linear(NativeWeightLinear):
    """Inputs rounded to int8, per token or with one stored scale, as the layer's activation spec says; products are added as integers."""

    name: ClassVar[str] = "native-int8-linear"
    int8_inputs: ClassVar[bool] = True

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
        if PREFIX + "scale" in found:
            found[PREFIX + "scale"] = found[PREFIX + "scale"].float()
        elif job.activation is not None and job.activation.when == "static":
            raise SpecError(f"{job.activation} is static, but its scale was not given; calibrate, or use when='dynamic'")
        return found


class NativeInt8ByWish(NativeInt8Linear):
    """Float inputs, rounded to int8 per token although nothing in the checkpoint says so: faster than float inputs, and not the same function.

    `choose` passes it by unless it is wished for by its name.
    """

    name: ClassVar[str] = "native-int8-by-wish"
    rank: ClassVar[int] = 40
    by_wish: ClassVar[bool] = True

    def _refuses_inputs(self, job: Job) -> str | None:
        return None if job.activation is None else f"is for layers with float inputs, got {job.activation}"

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        return super().__call__(x, parts, _with_int8_inputs(job) if x.requires_grad else job)


def _with_int8_inputs(job: Job) -> Job:
    return replace(job, activation=int_activation())
