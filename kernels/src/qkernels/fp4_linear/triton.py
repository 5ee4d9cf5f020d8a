"""The same on a GPU.  Element and scale are decoded by their bits, which works on every architecture; blocks scaled by the tensor core itself
(`tl.dot_scaled`, sm_100) are not used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._check import HALVES, require_one
from qkernels._gpu import Case, launch, pieces, require, rows_of, tiled
from qkernels._tiles import of_rows


@triton.jit
def e2m1(code):
    """Codes 0 … 15 as float32: a sign, two bits of exponent, one of mantissa; exponent 0 has no hidden one."""
    exponent = (code >> 1) & 3
    mantissa = (code & 1).to(tl.float32)
    power = (1 << exponent).to(tl.float32) * 0.5
    size = tl.where(exponent == 0, mantissa * 0.5, (1.0 + 0.5 * mantissa) * power)
    return tl.where((code & 8) != 0, -size, size)


@triton.jit
def e8m0(code):
    """2^(code - 127); 2^-127 is subnormal in float32"""
    return tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(code):
    """The finite numbers of float8_e4m3fn"""
    exponent = (code >> 3) & 15
    mantissa = code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    return tl.where((code & 128) != 0, -size, size)


@triton.jit
def fp4_linear_kernel(
    x_ptr, packed_ptr, scale_ptr, tensor_scale_ptr, y_ptr, T, N, K,
    MX: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = 32 if MX else 16
    rt = tl.program_id(0) * BT + tl.arange(0, BT)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    half = (rk % 2) * 4
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        at = k + rk
        x = tl.load(x_ptr + rt[:, None] * K + at[None, :], mask=(rt[:, None] < T) & (at[None, :] < K), other=0.0)
        inside = (rn[None, :] < N) & (at[:, None] < K)
        byte = tl.load(packed_ptr + rn[None, :] * (K // 2) + (at // 2)[:, None], mask=inside, other=0).to(tl.int32)
        bits = tl.load(scale_ptr + rn[None, :] * (K // GROUP) + (at // GROUP)[:, None], mask=inside, other=0).to(tl.int32)
        w = e2m1((byte >> half[:, None]) & 15) * (e8m0(bits) if MX else e4m3(bits))
        if not MX:
            w = w * tl.load(tensor_scale_ptr)
        acc = tl.dot(x, w.to(x.dtype), acc)
    tl.store(y_ptr + rt[:, None] * N + rn[None, :], acc.to(y_ptr.dtype.element_ty), mask=(rt[:, None] < T) & (rn[None, :] < N))


def fp4_linear(x: Tensor, packed: Tensor, scale: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
    """As `reference.fp4_linear`, but the weight is rounded to x's dtype before it is multiplied.

    x:      [..., K] float16 or bfloat16; bfloat16 holds every weight of MXFP4 exactly
    packed: [N, K/2] uint8;  scale: [N, K/32] uint8 (MXFP4), or [N, K/16] float8_e4m3fn with tensor_scale, one float32 (NVFP4)
    """
    k = x.shape[-1]
    rows = rows_of(x)
    require("x", rows, (None, None), HALVES)
    mx = scale.dtype is torch.uint8
    group = 32 if mx else 16
    if k % group:
        raise ValueError(f"x: has K={k}; allowed: multiples of {group} for {'MXFP4' if mx else 'NVFP4'}")
    require("packed", packed, (None, k // 2), (torch.uint8,), x)
    n = packed.shape[0]
    require("scale", scale, (n, k // group), (torch.uint8, torch.float8_e4m3fn), x)
    if mx == (tensor_scale is not None):
        raise ValueError(f"tensor_scale: is {'given' if mx else 'missing'}; allowed: one float32 with float8_e4m3fn scales, none with uint8 ones")
    if tensor_scale is not None:
        require_one("tensor_scale", tensor_scale, (torch.float32,), x)
    y = x.new_empty(rows.shape[0], n)
    if y.numel():
        packed, scale = packed.contiguous(), scale.contiguous().view(torch.uint8)
        own = packed if tensor_scale is None else tensor_scale.float().reshape(1)
        for part in pieces(rows.shape[0], k, n):
            _launch(rows[part], packed, scale, own, y[part], mx)
    return y.reshape(*x.shape[:-1], n)


def _launch(x: Tensor, packed: Tensor, scale: Tensor, tensor_scale: Tensor, y: Tensor, mx: bool) -> None:
    (t, k), n = x.shape, packed.shape[0]
    launch(
        fp4_linear_kernel,
        of_rows("fp4_linear", t),
        lambda tile: (triton.cdiv(t, tile["BT"]), triton.cdiv(n, tile["BN"])),
        (x, packed, scale, tensor_scale, y, t, n, k),
        {"MX": mx},
        size=t,
    )


def cases() -> list[Case]:
    found = []
    for mx, rows in ((True, 16), (False, 16), (True, 64), (False, 64)):
        signature = {"x_ptr": "*bf16", "packed_ptr": "*u8", "scale_ptr": "*u8", "tensor_scale_ptr": "*fp32", "y_ptr": "*bf16"}
        signature |= dict.fromkeys(("T", "N", "K"), "i32")
        name = f"fp4_linear {'mxfp4' if mx else 'nvfp4'} {rows} rows"
        found.append(tiled(name, fp4_linear_kernel, signature, {"MX": mx}, of_rows("fp4_linear", rows)))
    return found
