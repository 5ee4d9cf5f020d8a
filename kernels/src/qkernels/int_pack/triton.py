"""Integer weights in groups, to words and back, on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._check import FLOATS, require_choice, require_groups
from qkernels._gpu import Case, require


@triton.jit
def quantize_pack_kernel(w_ptr, scale_ptr, words_ptr, COUNT, K, groups, GROUP: tl.constexpr, BITS: tl.constexpr, BW: tl.constexpr):
    PER: tl.constexpr = 32 // BITS
    word = tl.program_id(0) * BW + tl.arange(0, BW)
    inside = word < COUNT
    row = (word // (K // PER)).to(tl.int64)
    first = (word % (K // PER)) * PER
    half: tl.constexpr = 1 << (BITS - 1)
    packed = tl.zeros((BW,), dtype=tl.int32)
    for j in tl.static_range(PER):
        w = tl.load(w_ptr + row * K + first + j, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row * groups + (first + j) // GROUP, mask=inside, other=1.0).to(tl.float32)
        z = tl.where(scale == 0, 0.0, tl.div_rn(w, tl.where(scale == 0, 1.0, scale)))
        z = tl.minimum(tl.maximum(z, -half + 0.0), half - 1.0)
        code = ((z + 12582912.0) - 12582912.0).to(tl.int32) + half
        packed |= code << (j * BITS)
    tl.store(words_ptr + word, packed, mask=inside)


@triton.jit
def dequantize_kernel(words_ptr, scale_ptr, w_ptr, COUNT, K, groups, GROUP: tl.constexpr, BITS: tl.constexpr, BW: tl.constexpr):
    PER: tl.constexpr = 32 // BITS
    word = tl.program_id(0) * BW + tl.arange(0, BW)
    inside = word < COUNT
    row = (word // (K // PER)).to(tl.int64)
    first = (word % (K // PER)) * PER
    packed = tl.load(words_ptr + word, mask=inside, other=0)
    for j in tl.static_range(PER):
        code = ((packed >> (j * BITS)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
        scale = tl.load(scale_ptr + row * groups + (first + j) // GROUP, mask=inside, other=0.0).to(tl.float32)
        tl.store(w_ptr + row * K + first + j, (code.to(tl.float32) * scale).to(w_ptr.dtype.element_ty), mask=inside)


def _groups_of(scale: Tensor, n: int, k: int, bits: int, like: Tensor) -> int:
    if bits not in (4, 8) or k % (32 // bits if bits else 1):
        raise ValueError(f"bits: got {bits} with K={k}; allowed: 4 with K a multiple of 8, 8 with K a multiple of 4")
    require("scale", scale, (n, None), FLOATS, like)
    groups = scale.shape[1]
    require_groups("scale", groups, k)
    return groups


def quantize_pack(w: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """As `reference.quantize_pack`, bit for bit.  w [N, K] float, scale [N, K/G] float → [N, K·bits / 32] int32"""
    require("w", w, (None, None), FLOATS)
    n, k = w.shape
    groups = _groups_of(scale, n, k, bits, w)
    words = torch.empty(n, k * bits // 32, dtype=torch.int32, device=w.device)
    if words.numel():
        quantize_pack_kernel[(triton.cdiv(words.numel(), 1024),)](
            w.contiguous(), scale.contiguous(), words, words.numel(), k, groups, GROUP=k // groups, BITS=bits, BW=1024, num_warps=4
        )
    return words


def dequantize(words: Tensor, scale: Tensor, *, bits: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As `reference.dequantize`, rounded to dtype.  words [N, K·bits / 32] int32, scale [N, K/G] float → [N, K] dtype"""
    require("words", words, (None, None), (torch.int32,))
    require_choice("dtype", dtype, FLOATS)
    n, k = words.shape[0], words.shape[1] * 32 // (bits or 1)
    groups = _groups_of(scale, n, k, bits, words)
    w = torch.empty(n, k, dtype=dtype, device=words.device)
    if w.numel():
        dequantize_kernel[(triton.cdiv(words.numel(), 1024),)](
            words.contiguous(), scale.contiguous(), w, words.numel(), k, groups, GROUP=k // groups, BITS=bits, BW=1024, num_warps=4
        )
    return w


def cases() -> list[Case]:
    constants = {"GROUP": 128, "BITS": 4, "BW": 1024}
    numbers = {"COUNT": "i32", "K": "i32", "groups": "i32"}
    packing = {"w_ptr": "*bf16", "scale_ptr": "*fp16", "words_ptr": "*i32"} | numbers
    unpacking = {"words_ptr": "*i32", "scale_ptr": "*fp16", "w_ptr": "*bf16"} | numbers
    return [
        Case("int_pack quantize_pack int4", quantize_pack_kernel, packing, constants, mma=False),
        Case("int_pack dequantize int4", dequantize_kernel, unpacking, constants, mma=False),
    ]
