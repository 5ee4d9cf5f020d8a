"""Dequantize the cache, then softmax attention."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require, require_choice


def dequantize(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """[..., S, D] float32 from codes [..., S, D·bits / 8] uint8 (the integer + 2^(bits-1); 4 bits: low nibble first) and scale [..., S]."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return (codes.float() - (1 << (bits - 1))) * scale.float().unsqueeze(-1)


def kv_attention(q: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, lengths: Tensor, *, bits: int) -> Tensor:
    """softmax(q Kᵀ / √D) V for one new token of each sequence.

    q:       [B, H, D] float;  H a multiple of C, the heads of the cache
    k, v:    [B, C, S, D·bits / 8] uint8, see `dequantize`
    k_scale, v_scale: [B, C, S] float32, one for each token and head
    lengths: [B] int32, how many of the S tokens are there, 1 at least
    return:  [B, H, D], q.dtype
    """
    require_choice("bits", bits, (4, 8))
    require("q", q, (None, None, None), FLOATING)
    b, h, d = q.shape
    require("k", k, (b, None, None, d * bits // 8), (torch.uint8,), q)
    c, s = k.shape[1:3]
    if c == 0 or h % c:
        raise ValueError(f"q: has {h} heads over {c} of the cache; allowed: a multiple of them")
    require("v", v, (b, c, s, d * bits // 8), (torch.uint8,), q)
    require("k_scale", k_scale, (b, c, s), FLOATING, q)
    require("v_scale", v_scale, (b, c, s), FLOATING, q)
    require("lengths", lengths, (b,), (torch.int32,), q)
    if b and not (int(lengths.min()) >= 1 and int(lengths.max()) <= s):
        raise ValueError(f"lengths: run from {int(lengths.min())} to {int(lengths.max())}; allowed: 1 to the {s} tokens of the cache")
    queries = q.float().reshape(b, c, h // c, d)
    scores = queries @ dequantize(k, k_scale, bits).mT / d**0.5
    there = torch.arange(s, device=q.device) < lengths[:, None]
    weights = scores.masked_fill(~there[:, None, None], float("-inf")).softmax(-1)
    return (weights @ dequantize(v, v_scale, bits)).reshape(b, h, d).to(q.dtype)
