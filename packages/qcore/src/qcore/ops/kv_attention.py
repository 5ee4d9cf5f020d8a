"""Kernels of attention over a coded cache: y = softmax(q Kᵀ / √D) V for one new token of each sequence.

| kernel | runs | rank |
|---|---|---|
| triton-kv-attention | symmetric 8- or 4-bit codes per token and head, without a window, on a GPU | 100 |
| reference-kv-attention | everything: codes are decoded, and attention runs on floats | 1000 |

A job's weight is the spec of the cached tensor, its shape (heads, head_dim), its packing "kv-codes", or "kv-codes+window" where floats lie behind
the codes.  Keys and values are chosen for each for themselves, and a kernel runs where it was chosen for both.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from qcore.numbers import Int, Offset, PerHead, QuantSpec
from qcore.ops.kernel import Job, Kernel

CODES, CODES_AND_WINDOW = "kv-codes", "kv-codes+window"


class ReferenceKVAttention(Kernel):
    """Attention over decoded keys and values.  parts: "k", "v" [B, C, S, D] float"""

    name: ClassVar[str] = "reference-kv-attention"
    op: ClassVar[str] = "kv-attention"
    rank: ClassVar[int] = 1000

    def refuses(self, job: Job) -> str | None:
        return None

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        k, v = parts["k"].to(x.dtype), parts["v"].to(x.dtype)
        return torch.nn.functional.scaled_dot_product_attention(x.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)


class TritonKVAttention(Kernel):
    """Codes are read once and decoded in registers (`qkernels.kv_attention`).

    parts: "k", "v" [B, C, S, D·b/8] uint8, the code + 2^(b-1), 4 bits: low nibble first; "k_scale", "v_scale" [B, C, S] float32; "lengths" [B] int32
    """

    name: ClassVar[str] = "triton-kv-attention"
    op: ClassVar[str] = "kv-attention"
    rank: ClassVar[int] = 100

    def refuses(self, job: Job) -> str | None:
        if why := refuses_codes(job):
            return why
        if job.device.type != "cuda":
            return f"runs on cuda, got {job.device}"
        if find_spec("triton") is None:
            return "triton is not installed"
        if job.dtype not in (torch.float16, torch.bfloat16):
            return f"needs float16 or bfloat16 queries, got {str(job.dtype).removeprefix('torch.')}"
        dim = job.shape[1]
        return None if dim in (16, 32, 64, 128, 256) else f"needs heads of 16, 32, 64, 128 or 256 channels, got {dim or 'an unknown number'}"

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        from qkernels.kv_attention import triton

        own = [parts[name] for name in ("k", "k_scale", "v", "v_scale", "lengths")]
        return triton.kv_attention(x, *own, bits=job.weight.format.bits)


def refuses_codes(job: Job) -> str | None:
    """Why the layout of `qkernels.kv_attention` cannot hold such a cache."""
    spec = job.weight
    if job.packing != CODES:
        return "needs codes alone; this policy has a window of floats behind them"
    if not isinstance(spec.format, Int) or not spec.format.signed or spec.format.bits not in (4, 8) or spec.offset is not Offset.NONE:
        return f"needs symmetric integers of 4 or 8 bits, got {spec}"
    if not isinstance(spec.granularity, PerHead) or spec.when != "dynamic" or isinstance(spec.scale, QuantSpec):
        return f"needs one float scale for each token and head, got {spec}"
    return None


def as_kernel_codes(packed: Tensor, bits: int) -> Tensor:
    """Two's complement as the cache packs it → the code + 2^(b-1): the uppermost bit of each code is the other one."""
    return packed ^ (0x88 if bits == 4 else 0x80)
