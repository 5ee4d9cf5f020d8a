"""The same on a GPU in one launch.  How many rows an expert has is read on the device, so the host waits for nothing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._check import FLOATS, HALVES, require_choice
from qkernels._gpu import Case, block_of_group, launch, require, tiled
from qkernels._tiles import default, of_rows


@triton.jit
def grouped_linear_kernel(
    x_ptr, ends_ptr, tiles_ptr, words_ptr, scale_ptr, shift_ptr, y_ptr, E, N, K, stride_words, groups,
    GROUP: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, EXPERTS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 32 // BITS
    tile = tl.program_id(0)
    # tiles_ptr: where the tiles of each expert end; as many as end before this one come before its expert
    at = tl.arange(0, EXPERTS)
    tile_ends = tl.load(tiles_ptr + at, mask=at < E, other=2147483647)
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    if expert < E:
        first_tile = tl.load(tiles_ptr + expert - 1, mask=expert > 0, other=0)
        first_row = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        row = first_row + (tile - first_tile) * BT
        left = tl.load(ends_ptr + expert) - row
        # what a whole array may hold more than 2^31 of is counted from a start of 64 bits
        x_at = x_ptr + row.to(tl.int64) * K
        y_at = y_ptr + row.to(tl.int64) * N
        words_at = words_ptr + expert.to(tl.int64) * N * stride_words
        scale_at = scale_ptr + expert.to(tl.int64) * N * groups
        shift_at = shift_ptr + expert.to(tl.int64) * N * groups
        rt = tl.arange(0, BT)
        rn = tl.program_id(1) * BN + tl.arange(0, BN)
        rk = tl.arange(0, BK)
        bits = (rk % PER) * BITS
        acc = tl.zeros((BT, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            x = tl.load(x_at + rt[:, None] * K + (k + rk)[None, :], mask=rt[:, None] < left, other=0.0)
            words = tl.load(words_at + rn[None, :] * stride_words + ((k + rk) // PER)[:, None], mask=rn[None, :] < N, other=0)
            codes = ((words >> bits[:, None]) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
            # a block never crosses a group
            group = rn * groups + k // GROUP
            scale = tl.load(scale_at + group, mask=rn < N, other=0.0).to(tl.float32)
            w = codes.to(tl.float32) * scale[None, :]
            if SHIFT:
                w += tl.load(shift_at + group, mask=rn < N, other=0.0)[None, :]
            acc = tl.dot(x, w.to(x.dtype), acc)
        tl.store(y_at + rt[:, None] * N + rn[None, :], acc.to(y_ptr.dtype.element_ty), mask=(rt[:, None] < left) & (rn[None, :] < N))


def grouped_linear(x: Tensor, ends: Tensor, words: Tensor, scale: Tensor, shift: Tensor | None = None, *, bits: int) -> Tensor:
    """As `reference.grouped_linear`, but weights are rounded to x's dtype before they are multiplied.

    x:     [T, K] float16 or bfloat16
    ends:  [E] int32, ascending, the last one at most T: not checked, as that would wait for the device
    words: [E, N, K·bits / 32] int32, codes + 2^(bits-1), lowest bits first (`int_pack.pack`)
    scale: [E, N, K/G] float; G a multiple of 16
    shift: [E, N, K/G] float32, or None
    """
    require_choice("bits", bits, (4, 8))
    require("x", x, (None, None), HALVES)
    t, k = x.shape
    require("words", words, (None, None, k * bits // 32), (torch.int32,), x)
    experts, n, _ = words.shape
    require("ends", ends, (experts,), (torch.int32,), x)
    require("scale", scale, (experts, n, None), FLOATS, x)
    groups = scale.shape[2]
    block = block_of_group(groups, k, 16)
    if shift is not None:
        require("shift", shift, (experts, n, groups), (torch.float32,), x)
    # no program writes the rows of no expert
    y = x.new_zeros(t, n)
    if y.numel():
        rows = triton.cdiv(t, experts)
        tiles_of = of_rows("grouped_linear", rows)
        bt = default(tiles_of).blocks["BT"]
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        tiles = ((counts + bt - 1) // bt).cumsum(0).to(torch.int32)
        words, scale = words.contiguous(), scale.contiguous()
        other = scale if shift is None else shift.contiguous()
        launch(
            grouped_linear_kernel,
            tiles_of,
            # at most one tile of each expert is not full
            lambda tile: (triton.cdiv(t, bt) + experts, triton.cdiv(n, tile["BN"])),
            (x.contiguous(), ends.contiguous(), tiles, words, scale, other, y, experts, n, k, words.shape[2], groups),
            {"GROUP": k // groups, "BITS": bits, "SHIFT": shift is not None, "EXPERTS": triton.next_power_of_2(experts)},
            size=rows,
            block=block,
        )
    return y


def cases() -> list[Case]:
    found = []
    for bits, rows in ((4, 16), (8, 16), (4, 64), (8, 64)):
        signature = {"x_ptr": "*bf16", "ends_ptr": "*i32", "tiles_ptr": "*i32", "words_ptr": "*i32", "scale_ptr": "*fp16"}
        signature |= {"shift_ptr": "*fp32", "y_ptr": "*bf16"}
        signature |= dict.fromkeys(("E", "N", "K", "stride_words", "groups"), "i32")
        constants = {"GROUP": 128, "BITS": bits, "SHIFT": True, "EXPERTS": 64}
        found.append(tiled(f"grouped_linear int{bits} {rows} rows", grouped_linear_kernel, signature, constants, of_rows("grouped_linear", rows)))
    return found
