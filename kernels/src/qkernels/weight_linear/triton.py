"""The same on a GPU, straight from the words of compressed-tensors' pack-quantized layout."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._check import FLOATS, HALVES, require_choice
from qkernels._gpu import Case, block_of_group, launch, pieces, require, rows_of, tiled
from qkernels._tiles import of_rows


@triton.jit
def weight_linear_kernel(
    x_ptr, words_ptr, scale_ptr, shift_ptr, y_ptr, T, N, K, stride_words, groups,
    GROUP: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 32 // BITS
    rt = tl.program_id(0) * BT + tl.arange(0, BT)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    bits = (rk % PER) * BITS
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        x = tl.load(x_ptr + rt[:, None] * K + (k + rk)[None, :], mask=rt[:, None] < T, other=0.0)
        # neighbours read one word; the first-level cache serves it
        words = tl.load(words_ptr + rn[None, :] * stride_words + ((k + rk) // PER)[:, None], mask=rn[None, :] < N, other=0)
        codes = ((words >> bits[:, None]) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
        # a block never crosses a group
        at = rn * groups + k // GROUP
        scale = tl.load(scale_ptr + at, mask=rn < N, other=0.0).to(tl.float32)
        w = codes.to(tl.float32) * scale[None, :]
        if SHIFT:
            w += tl.load(shift_ptr + at, mask=rn < N, other=0.0)[None, :]
        acc = tl.dot(x, w.to(x.dtype), acc)
    tl.store(y_ptr + rt[:, None] * N + rn[None, :], acc.to(y_ptr.dtype.element_ty), mask=(rt[:, None] < T) & (rn[None, :] < N))


def weight_linear(x: Tensor, words: Tensor, scale: Tensor, shift: Tensor | None = None, *, bits: int) -> Tensor:
    """As `reference.weight_linear`, but the weight is rounded to x's dtype before it is multiplied.

    x:      [..., K] float16 or bfloat16
    words:  [N, K·bits / 32] int32, codes + 2^(bits-1), lowest bits first (`int_pack.pack`)
    scale:  [N, K/G] float32, float16 or bfloat16; G a multiple of 16
    shift:  [N, K/G] float32, or None
    bits:   4 or 8
    """
    require_choice("bits", bits, (4, 8))
    k = x.shape[-1]
    rows = rows_of(x)
    require("x", rows, (None, None), HALVES)
    require("words", words, (None, k * bits // 32), (torch.int32,), x)
    n = words.shape[0]
    require("scale", scale, (n, None), FLOATS, x)
    groups = scale.shape[1]
    block = block_of_group(groups, k, 16)
    if shift is not None:
        require("shift", shift, (n, groups), (torch.float32,), x)
    y = x.new_empty(rows.shape[0], n)
    if y.numel():
        words, scale = words.contiguous(), scale.contiguous()
        other = scale if shift is None else shift.contiguous()
        for own in pieces(rows.shape[0], k, n):
            _launch(rows[own], words, scale, other, y[own], {"GROUP": k // groups, "BITS": bits, "SHIFT": shift is not None}, block)
    return y.reshape(*x.shape[:-1], n)


def _launch(x: Tensor, words: Tensor, scale: Tensor, other: Tensor, y: Tensor, constants: dict[str, int], block: int) -> None:
    (t, k), n = x.shape, words.shape[0]
    launch(
        weight_linear_kernel,
        of_rows("weight_linear", t),
        lambda tile: (triton.cdiv(t, tile["BT"]), triton.cdiv(n, tile["BN"])),
        (x, words, scale, other, y, t, n, k, words.shape[1], scale.shape[1]),
        constants,
        size=t,
        block=block,
    )


def cases() -> list[Case]:
    found = []
    for bits, dtype, rows in ((4, "fp16", 16), (8, "bf16", 16), (4, "bf16", 64), (8, "bf16", 64)):
        signature = {"x_ptr": f"*{dtype}", "words_ptr": "*i32", "scale_ptr": "*fp16", "shift_ptr": "*fp32", "y_ptr": f"*{dtype}"}
        signature |= dict.fromkeys(("T", "N", "K", "stride_words", "groups"), "i32")
        constants = {"GROUP": 128, "BITS": bits, "SHIFT": True}
        name = f"weight_linear int{bits} {dtype} {rows} rows"
        found.append(tiled(name, weight_linear_kernel, signature, constants, of_rows("weight_linear", rows)))
    return found
