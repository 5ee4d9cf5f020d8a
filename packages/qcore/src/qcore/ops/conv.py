"""Kernels of convolutions: oneDNN's integers, and the reference.

| kernel | runs | rank | what it costs |
|---|---|---|---|
| onednn-int8-conv | int8 weights × static 8-bit inputs, two axes, on CPU | 100 | a second copy of the codes in oneDNN's layout |
| reference-conv | everything, everywhere | 1000 | the float weight is made for each call |

Both quantize the input to the same codes.  The reference multiplies numbers and adds them in x's dtype; the integer kernel's sums are exact, so what
they put out agrees to that rounding, and codes made of it to one code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from qkernels.int8_conv import cpu
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import Int, Offset, PerChannel, PerTensor, QTensor
from qcore.ops.activation import PREFIX, quantize_input, static_parts
from qcore.ops.kernel import Job, Kernel

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class ConvJob(Job):
    """geometry: "weight" (the shape of the float weight), "stride", "padding", "dilation", "groups", "padding_mode", as of nn.Conv1d, 2d, 3d"""

    geometry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> int:
        return len(self.geometry["weight"]) - 2


def sides(geometry: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis; "same" padding is uneven for even kernels."""
    kernel, padding = geometry["weight"][2:], geometry["padding"]
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(geometry["dilation"], kernel, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in padding]


def _unpacked(parts: Mapping[str, Tensor], job: Job) -> QTensor:
    assert job.unpack is not None, f"{job.op} on {job.packing!r} came without its packing's `unpack`"
    return job.unpack(parts)


def _sealed(job: Job) -> str | None:
    return None if job.unpack is not None else f"the job does not say how packing {job.packing!r} is unpacked"


class ReferenceConv(Kernel):
    """Give every code its value, then convolve: the meaning of the op.  The weight is rounded to x's dtype."""

    name: ClassVar[str] = "reference-conv"
    op: ClassVar[str] = "conv"
    rank: ClassVar[int] = 1000

    def refuses(self, job: Job) -> str | None:
        return _sealed(job)

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        assert isinstance(job, ConvJob)
        g, axes = job.geometry, job.axes
        if job.activation is not None:
            rows = x.movedim(-1 - axes, -1)
            x = quantize_input(rows, job.activation, static_parts(parts)).movedim(-1, -1 - axes)
        weight = _unpacked(parts, job).dequantize().reshape(g["weight"]).to(x.dtype)
        padding = g["padding"] if isinstance(g["padding"], str) else tuple(g["padding"])
        if g["padding_mode"] != "zeros":
            x = F.pad(x, [side for pair in reversed(sides(g)) for side in pair], mode=g["padding_mode"])
            padding = (0,) * axes
        return _CONV[axes](x, weight, None, tuple(g["stride"]), padding, tuple(g["dilation"]), g["groups"])


class OnednnInt8Conv(Kernel):
    """W8A8: uint8 × int8 → int32, exact; the scales are multiplied in float32 afterwards.  Signed input codes run as unsigned ones, 128 higher."""

    name: ClassVar[str] = "onednn-int8-conv"
    op: ClassVar[str] = "conv"
    rank: ClassVar[int] = 100

    def refuses(self, job: Job) -> str | None:
        assert isinstance(job, ConvJob)
        w, a, g = job.weight, job.activation, job.geometry
        if job.device.type != "cpu":
            return f"runs on cpu, got {job.device}"
        if reason := cpu.missing():
            return reason
        if job.dtype is not torch.float32:
            return f"gives float32, got {str(job.dtype).removeprefix('torch.')}"
        if not isinstance(w.format, Int) or not w.format.signed or not 2 <= w.format.bits <= 8 or w.offset is not Offset.NONE:
            return f"needs symmetric integer weights of 2 to 8 bits, got {w}"
        if not isinstance(w.granularity, PerTensor) and not (isinstance(w.granularity, PerChannel) and w.granularity.axis in (0, -2)):
            return f"needs weights with a scale per output channel (axis 0) or tensor, got {w.granularity}"
        if a is None or not isinstance(a.format, Int) or a.format.bits != 8 or a.when != "static" or not isinstance(a.granularity, PerTensor):
            return f"needs static 8-bit inputs per tensor, got {a or 'float inputs'}"
        if a.offset is Offset.VALUE:
            return f"needs inputs with an integer zero point or none, got {a}"
        if job.axes != 2:
            return f"runs convolutions of 2 axes, got {job.axes}"
        if g["padding_mode"] != "zeros" or any(before != after for before, after in sides(g)):
            return f"pads with zeros, as much before as after, got padding={g['padding']!r}, padding_mode={g['padding_mode']!r}"
        if job.shape[1] >= 1 << 16:
            return f"an int32 sum holds fewer than {1 << 16} products, got K={job.shape[1]}"
        if w.format.bits == 8 and cpu.saturates():
            return "this processor has no VNNI: sums of 8-bit products would saturate in 16 bits; weights of 7 bits or fewer run"
        return _sealed(job)

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        assert isinstance(job, ConvJob)
        q = _unpacked(parts, job)
        scale = q.scale().flatten().float().expand(job.shape[0]).contiguous()
        x_scale, x_zero = self._input(parts, job)
        if x_scale <= 0:
            raise SpecError(
                f"{self.name}: the input's scale is {x_scale:g}, and nothing can be divided by it; calibrate on data that reaches this layer"
            )
        packed = cpu.prepack(q.codes.reshape(tuple(job.geometry["weight"])).contiguous(), scale, x_scale, x_zero, *self._geometry(job))
        # the input's parts as numbers: reading them out of tensors at each call would cost more than small layers do
        return {"packed": packed, "scale": scale, "input": torch.tensor([x_scale, x_zero], dtype=torch.float64)}

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        assert isinstance(job, ConvJob) and job.activation is not None
        if x.numel() == 0 or x.ndim != 4 or x.dtype is not torch.float32:
            raise SpecError(f"{self.name} takes float32 images [B, C, H, W] with values, got {tuple(x.shape)} {x.dtype}")
        if x.shape[1] != job.geometry["weight"][1] * job.geometry["groups"]:
            raise SpecError(f"{self.name} was built for {job.geometry['weight'][1] * job.geometry['groups']} channels, got {tuple(x.shape)}")
        x_scale, x_zero = parts["input"].tolist()
        codes = (x / x_scale).add_(x_zero).round_().clamp_(0, 255).to(torch.uint8)
        return cpu.int8_conv(codes, parts["packed"], x_scale, int(x_zero), parts["scale"], *self._geometry(job))

    @staticmethod
    def _input(parts: Mapping[str, Tensor], job: Job) -> tuple[float, int]:
        """Scale and zero point of the input, as of unsigned codes."""
        assert job.activation is not None
        zero = int(parts[PREFIX + "offset"].item()) if job.activation.offset is Offset.CODE else 0
        signed = isinstance(job.activation.format, Int) and job.activation.format.signed
        return float(parts[PREFIX + "scale"].item()), zero + (128 if signed else 0)

    @staticmethod
    def _geometry(job: ConvJob) -> tuple[list[int], list[int], list[int], int]:
        g = job.geometry
        return list(g["stride"]), [before for before, _ in sides(g)], list(g["dilation"]), int(g["groups"])
