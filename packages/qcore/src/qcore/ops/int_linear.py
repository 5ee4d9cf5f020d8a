"""Integer inputs × integer weights, whatever their bits and zero points: torch's int8 product, group by group.

With codes c, zero points z and scales s, of an input row (x) and of a group of an output channel (w):

    y = s_x Σ_groups s_w · (Σ c_x c_w - z_x Σ c_w - z_w Σ c_x + n z_x z_w)

The bracket is exact in int32; scales follow in float32.  Codes of fewer than 8 bits lie in int8.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qcore.numbers import Int, Offset, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, quantize
from qcore.ops.activation import static_parts
from qcore.ops.kernel import Job, Kernel

_FIT = 1 << 15  # of four sums of products of int8, in an int32


class TorchIntLinear(Kernel):
    """W4A4, W4A8, W8A8 with zero points or static scales: everything that is integers of 2 to 8 bits on both sides and no faster kernel takes.

    The reference multiplies decoded values and adds them in the dtype of x; this one adds integers, and is the more exact of the two.
    """

    name: ClassVar[str] = "torch-int-linear"
    op: ClassVar[str] = "linear"
    rank: ClassVar[int] = 150

    def refuses(self, job: Job) -> str | None:
        if job.device.type != "cpu":
            return f"runs on cpu, got {job.device}"
        if not hasattr(torch, "_int_mm"):
            return "this torch has no _int_mm"
        return _refuses_inputs(job.activation) or _refuses_weight(job) or (None if job.unpack else "the job does not say how its packing is unpacked")

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        assert job.unpack is not None
        q, size = job.unpack(parts), _group(job)
        codes = q.codes.unflatten(1, (-1, size)).transpose(0, 1).contiguous()  # [G, N, K/G]
        found = {"codes": codes, "sum": codes.sum(-1, dtype=torch.int32), "scale": _by_group(q.scale(), codes)}
        if q.spec.offset is Offset.CODE:
            found["offset"] = _by_group(q.parts["offset"].to(torch.int32), codes)
        return found | {name: part for name, part in parts.items() if name.startswith("input.")}

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        assert job.activation is not None
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], job.shape[0])
        rows = quantize(x.reshape(-1, x.shape[-1]), job.activation, static_parts(parts) if job.activation.when == "static" else None)
        codes, scale, zeros = parts["codes"], parts["scale"], parts.get("offset")
        row_zero = rows.parts["offset"].to(torch.int32) if job.activation.offset is Offset.CODE else None  # [T, 1], or [1, 1]
        y: Tensor | None = None
        for g, own in enumerate(rows.codes.split(codes.shape[2], 1)):
            total = torch._int_mm(own.contiguous(), codes[g].t())  # [T, N] int32
            if row_zero is not None:
                total -= row_zero * parts["sum"][g]
            if zeros is not None:
                total -= zeros[g] * own.sum(1, keepdim=True, dtype=torch.int32)
                if row_zero is not None:
                    total += codes.shape[2] * row_zero * zeros[g]
            part = total.float() * scale[g]
            y = part if y is None else y.add_(part)
        assert y is not None
        return (y * rows.scale()).to(x.dtype).reshape(*x.shape[:-1], -1)


def _refuses_inputs(a: QuantSpec | None) -> str | None:
    if a is None or not _is_int(a):
        return f"needs integer inputs of 2 to 8 bits, got {a or 'float inputs'}"
    if a.offset is Offset.VALUE or isinstance(a.scale, QuantSpec):
        return f"needs inputs with one float scale and at most an integer zero point, got {a}"
    if isinstance(a.granularity, PerToken) and a.when == "dynamic":
        return None
    return None if isinstance(a.granularity, PerTensor) else f"needs dynamic scales per token, or one for all inputs, got {a}"


def _refuses_weight(job: Job) -> str | None:
    w, g = job.weight, job.weight.granularity
    if not _is_int(w) or w.offset is Offset.VALUE:
        return f"needs integer weights of 2 to 8 bits, with at most an integer zero point, got {w}"
    if not isinstance(g, PerGroup | PerChannel | PerTensor) or (isinstance(g, PerChannel) and g.axis not in (0, -2)):
        return f"needs scales per group, output channel or tensor, got {w}"
    if _group(job) >= _FIT:
        return f"an int32 holds the sums of fewer than {_FIT} products, got {_group(job)}"
    return None


def _is_int(spec: QuantSpec) -> bool:
    # one bit means -1 and +1, not its code
    return isinstance(spec.format, Int) and spec.format.signed and spec.format.bits > 1


def _group(job: Job) -> int:
    return job.weight.granularity.block(job.shape)[1]


def _by_group(values: Tensor, codes: Tensor) -> Tensor:
    """[N, G], [N, 1] or [1, 1] → [G, N]"""
    return values.expand(codes.shape[1], codes.shape[0]).t().contiguous()
