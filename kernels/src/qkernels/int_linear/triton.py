"""The same on a GPU, from already quantized rows: int8 tensor cores, one scaling a block."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._check import FLOATS, require_choice
from qkernels._gpu import Case, block_of_group, launch, pieces, require, tiled
from qkernels._tiles import of_rows


@triton.jit
def int_linear_kernel(
    q_ptr, x_scale_ptr, words_ptr, scale_ptr, shift_ptr, y_ptr, T, N, K, stride_words, groups,
    GROUP: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 32 // BITS
    rt = tl.program_id(0) * BT + tl.arange(0, BT)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    bits = (rk % PER) * BITS
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        q = tl.load(q_ptr + rt[:, None] * K + (k + rk)[None, :], mask=rt[:, None] < T, other=0)
        words = tl.load(words_ptr + rn[None, :] * stride_words + ((k + rk) // PER)[:, None], mask=rn[None, :] < N, other=0)
        codes = (((words >> bits[:, None]) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(tl.int8)
        at = rn * groups + k // GROUP
        scale = tl.load(scale_ptr + at, mask=rn < N, other=0.0).to(tl.float32)
        acc += tl.dot(q, codes, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
        if SHIFT:
            shift = tl.load(shift_ptr + at, mask=rn < N, other=0.0)
            acc += tl.sum(q.to(tl.int32), 1).to(tl.float32)[:, None] * shift[None, :]
    x_scale = tl.load(x_scale_ptr + rt, mask=rt < T, other=0.0)
    acc = acc * x_scale[:, None]
    tl.store(y_ptr + rt[:, None] * N + rn[None, :], acc.to(y_ptr.dtype.element_ty), mask=(rt[:, None] < T) & (rn[None, :] < N))


def int_linear(
    q: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, shift: Tensor | None = None, *, bits: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """As `reference.int_linear` from its quantized rows; sums over groups in float32.

    q:       [T, K] int8;  x_scale: [T, 1] float32 (`quantize_rows`)
    words:   [N, K·bits / 32] int32, codes + 2^(bits-1), lowest bits first (`int_pack.pack`)
    scale:   [N, K/G] float32, float16 or bfloat16; G a multiple of 32
    shift:   [N, K/G] float32, or None
    return:  [T, N] dtype
    """
    require_choice("bits", bits, (4, 8))
    require_choice("dtype", dtype, FLOATS)
    require("q", q, (None, None), (torch.int8,))
    t, k = q.shape
    require("x_scale", x_scale, (t, 1), (torch.float32,), q)
    require("words", words, (None, k * bits // 32), (torch.int32,), q)
    n = words.shape[0]
    require("scale", scale, (n, None), FLOATS, q)
    groups = scale.shape[1]
    block = block_of_group(groups, k, 32)
    if shift is not None:
        require("shift", shift, (n, groups), (torch.float32,), q)
    y = torch.empty(t, n, dtype=dtype, device=q.device)
    if y.numel():
        q, x_scale, words, scale = q.contiguous(), x_scale.contiguous(), words.contiguous(), scale.contiguous()
        other = scale if shift is None else shift.contiguous()
        for own in pieces(t, k, n):
            constants = {"GROUP": k // groups, "BITS": bits, "SHIFT": shift is not None}
            _launch(q[own], x_scale[own], words, scale, other, y[own], constants, block)
    return y


def _launch(q: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, other: Tensor, y: Tensor, constants: dict[str, int], block: int) -> None:
    (t, k), n = q.shape, words.shape[0]
    launch(
        int_linear_kernel,
        of_rows("int_linear", t),
        lambda tile: (triton.cdiv(t, tile["BT"]), triton.cdiv(n, tile["BN"])),
        (q, x_scale, words, scale, other, y, t, n, k, words.shape[1], scale.shape[1]),
        constants,
        size=t,
        block=block,
    )


def cases() -> list[Case]:
    found = []
    for bits, rows in ((4, 16), (8, 16), (4, 64), (8, 64)):
        signature = {"q_ptr": "*i8", "x_scale_ptr": "*fp32", "words_ptr": "*i32", "scale_ptr": "*fp16", "shift_ptr": "*fp32", "y_ptr": "*bf16"}
        signature |= dict.fromkeys(("T", "N", "K", "stride_words", "groups"), "i32")
        constants = {"GROUP": 128, "BITS": bits, "SHIFT": True}
        found.append(tiled(f"int_linear int{bits} {rows} rows", int_linear_kernel, signature, constants, of_rows("int_linear", rows)))
    return found
