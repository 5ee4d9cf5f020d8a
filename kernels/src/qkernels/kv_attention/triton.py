"""The same on a GPU: codes are read once and never stored as floats.  One program does one head of the cache with all queries that share it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._check import HALVES, require_choice
from qkernels._gpu import Case, launch, require, tiled


@triton.jit
def codes_at(ptr, rs, rd, S, BYTES: tl.constexpr, BITS: tl.constexpr):
    """[BS, D] float32, the integers of the tokens rs"""
    PER: tl.constexpr = 8 // BITS
    byte = tl.load(ptr + rs[:, None] * BYTES + (rd // PER)[None, :], mask=rs[:, None] < S, other=0).to(tl.int32)
    return (((byte >> ((rd % PER) * BITS)[None, :]) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(tl.float32)


@triton.jit
def kv_attention_kernel(
    q_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, lengths_ptr, y_ptr, C, S, factor,
    SHARE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = D * BITS // 8
    b = tl.program_id(0).to(tl.int64)
    head = b * C + tl.program_id(1)
    rh = tl.arange(0, BH)
    rd = tl.arange(0, D)
    length = tl.load(lengths_ptr + b)
    rows = (head * SHARE + rh)[:, None] * D + rd[None, :]
    q = tl.load(q_ptr + rows, mask=rh[:, None] < SHARE, other=0.0)
    best = tl.full((BH,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BH,), dtype=tl.float32)
    acc = tl.zeros((BH, D), dtype=tl.float32)
    for start in range(0, length, BS):
        rs = start + tl.arange(0, BS)
        # integers of 8 bits are exact in either 16-bit float; the scales follow in float32
        k = codes_at(k_ptr + head * S * BYTES, rs, rd, S, BYTES, BITS).to(q.dtype)
        k_scale = tl.load(k_scale_ptr + head * S + rs, mask=rs < length, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * (k_scale * factor)[None, :]
        scores = tl.where(rs[None, :] < length, scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        keep = tl.exp(best - top)
        weights = tl.exp(scores - top[:, None])
        total = total * keep + tl.sum(weights, 1)
        v = codes_at(v_ptr + head * S * BYTES, rs, rd, S, BYTES, BITS).to(q.dtype)
        v_scale = tl.load(v_scale_ptr + head * S + rs, mask=rs < length, other=0.0)
        acc = tl.dot((weights * v_scale[None, :]).to(q.dtype), v, acc * keep[:, None])
        best = top
    tl.store(y_ptr + rows, (acc / total[:, None]).to(y_ptr.dtype.element_ty), mask=rh[:, None] < SHARE)


def kv_attention(q: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, lengths: Tensor, *, bits: int) -> Tensor:
    """As `reference.kv_attention`, with attention weights rounded to q's dtype.

    q: [B, H, D] float16 or bfloat16; D a power of two from 16 to 256, at most 64 queries a head of the cache
    lengths: 1 … S: not checked, as that would wait for the device
    """
    require_choice("bits", bits, (4, 8))
    require("q", q, (None, None, None), HALVES)
    b, h, d = q.shape
    if d < 16 or d > 256 or d & (d - 1):
        raise ValueError(f"q: has D={d}; allowed: 16, 32, 64, 128, 256")
    require("k", k, (b, None, None, d * bits // 8), (torch.uint8,), q)
    c, s = k.shape[1:3]
    if c == 0 or h % c or h // c > 64:
        raise ValueError(f"q: has {h} heads over {c} of the cache; allowed: up to 64 for each")
    require("v", v, (b, c, s, d * bits // 8), (torch.uint8,), q)
    require("k_scale", k_scale, (b, c, s), (torch.float32,), q)
    require("v_scale", v_scale, (b, c, s), (torch.float32,), q)
    require("lengths", lengths, (b,), (torch.int32,), q)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    if y.numel():
        share = h // c
        tensors = (t.contiguous() for t in (q, k, k_scale, v, v_scale, lengths))
        launch(
            kv_attention_kernel,
            "kv_attention",
            lambda tile: (b, c),
            (*tensors, y, c, s, d**-0.5),
            {"SHARE": share, "D": d, "BITS": bits, "BH": max(16, triton.next_power_of_2(share))},
            size=s,
        )
    return y


def cases() -> list[Case]:
    found = []
    for bits in (8, 4):
        signature = {"q_ptr": "*bf16", "k_ptr": "*u8", "k_scale_ptr": "*fp32", "v_ptr": "*u8", "v_scale_ptr": "*fp32", "lengths_ptr": "*i32"}
        signature |= {"y_ptr": "*bf16", "C": "i32", "S": "i32", "factor": "fp32"}
        constants = {"SHARE": 4, "D": 128, "BITS": bits, "BH": 16}
        found.append(tiled(f"kv_attention int{bits}", kv_attention_kernel, signature, constants, "kv_attention"))
    return found
