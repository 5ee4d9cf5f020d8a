"""The same on a GPU: one program a row, in two passes over it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._check import FLOATS, require_one
from qkernels._gpu import Case, require


@triton.jit
def row_scale(high, low):
    """max(high / 127, -low / 128), and 1 for zeros; divisions as IEEE has them, as the reference divides"""
    scale = tl.maximum(tl.div_rn(high, high * 0 + 127.0), tl.div_rn(-low, low * 0 + 128.0))
    return tl.where((high == 0) & (low == 0), 1.0, scale)


@triton.jit
def to_codes(x, scale):
    """round(x / scale) to even, clipped"""
    z = tl.div_rn(x, tl.where(scale == 0, 1.0, scale) + x * 0)
    z = tl.minimum(tl.maximum(tl.where(scale == 0, 0.0, z), -128.0), 127.0)
    # 1.5 · 2^23: its neighbours are whole numbers
    return ((z + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def quantize_rows_kernel(x_ptr, q_ptr, scale_ptr, K, stride, STATIC: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BK)
    if STATIC:
        scale = tl.load(scale_ptr + row)
    else:
        high = tl.zeros((BK,), dtype=tl.float32)
        low = tl.zeros((BK,), dtype=tl.float32)
        for k in range(0, K, BK):
            x = tl.load(x_ptr + row * stride + k + at, mask=k + at < K, other=0.0).to(tl.float32)
            high = tl.maximum(high, x)
            low = tl.minimum(low, x)
        scale = row_scale(tl.max(high, 0), tl.min(low, 0))
        tl.store(scale_ptr + row, scale)
    for k in range(0, K, BK):
        x = tl.load(x_ptr + row * stride + k + at, mask=k + at < K, other=0.0).to(tl.float32)
        tl.store(q_ptr + row * K + k + at, to_codes(x, scale), mask=k + at < K)


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_rows`, bit for bit, for finite values: looking for others would cost a wait for the device.

    x: [T, K] float32, float16 or bfloat16, rows contiguous in themselves
    """
    require("x", x, (None, None), FLOATS)
    if scale is not None:
        require_one("scale", scale, FLOATS, x)
    if x.stride(-1) != 1:
        x = x.contiguous()
    t, k = x.shape
    q = torch.empty(t, k, dtype=torch.int8, device=x.device)
    scales = torch.ones(t, 1, device=x.device) if scale is None else scale.float().reshape(1, 1).repeat(t, 1)
    if x.numel():
        block = min(triton.next_power_of_2(k), 4096)
        quantize_rows_kernel[(t,)](x, q, scales, k, x.stride(0), STATIC=scale is not None, BK=block, num_warps=4)
    return q, scales


def cases() -> list[Case]:
    signature = {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32", "K": "i32", "stride": "i32"}
    return [Case("quantize_rows bf16", quantize_rows_kernel, signature, {"STATIC": False, "BK": 4096}, mma=False)]
