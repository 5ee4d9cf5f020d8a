"""The same on a GPU: a row stays in registers through log2 butterflies, the small matrix, and the rounding; it is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._check import FLOATS
from qkernels._gpu import Case, require
from qkernels.quantize_rows.triton import row_scale, to_codes


@triton.jit
def hadamard_quantize_kernel(
    x_ptr, small_ptr, q_ptr, scale_ptr, K, stride, factor,
    M: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # K = M · POWER values as [ROWS, POWER], ROWS the next tile size from M on; what lies beyond M is zero and stays so
    at = tl.arange(0, ROWS)[:, None] * POWER + tl.arange(0, POWER)[None, :]
    inside = tl.arange(0, ROWS)[:, None] < M
    x = tl.load(x_ptr + row * stride + at, mask=inside & (at < K), other=0.0).to(tl.float32)
    for i in tl.static_range(LOG):
        pairs = tl.reshape(x, (ROWS * (POWER // (2 << i)), 2, 1 << i))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, POWER))
    if M > 1:
        # ±1 times float32: not rounded to TF32
        cells = tl.arange(0, ROWS)[:, None] * M + tl.arange(0, ROWS)[None, :]
        small = tl.load(small_ptr + cells, mask=inside & (tl.arange(0, ROWS)[None, :] < M), other=0.0)
        x = tl.dot(small, x, input_precision="ieee")
    x = x * factor
    scale = row_scale(tl.maximum(tl.max(tl.max(x, 1), 0), 0.0), tl.minimum(tl.min(tl.min(x, 1), 0), 0.0))
    tl.store(scale_ptr + row, scale)
    tl.store(q_ptr + row * K + at, to_codes(x, scale), mask=inside)


def hadamard_quantize(x: Tensor, small: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.hadamard_quantize`; float32 sums in another order, so that a value between two codes may fall to the other one.

    x:     [T, K] float32, float16 or bfloat16; K = m · 2^p up to 32768, 2^p at least 16 where m > 1
    small: [m, m] float32 with entries ±1, m up to 64; None = 1
    """
    require("x", x, (None, None), FLOATS)
    t, k = x.shape
    m = 1 if small is None else small.shape[0]
    power = k // m if m and k % m == 0 else 0
    if power < (16 if m > 1 else 1) or power & (power - 1) or k > 32768 or m > 64:
        raise ValueError(f"x: has K={k} with a small matrix of {m}; allowed: K = m · 2^p up to 32768, m up to 64, and 2^p at least 16 where m > 1")
    if small is None:
        small = torch.ones(1, 1, device=x.device)
    require("small", small, (m, m), (torch.float32,), x)
    if x.stride(-1) != 1:
        x = x.contiguous()
    q, scale = torch.empty(t, k, dtype=torch.int8, device=x.device), torch.ones(t, 1, device=x.device)
    if t:
        rows = 1 if m == 1 else max(16, triton.next_power_of_2(m))
        hadamard_quantize_kernel[(t,)](
            x, small.contiguous(), q, scale, k, x.stride(0), k**-0.5,
            M=m, ROWS=rows, POWER=power, LOG=power.bit_length() - 1, num_warps=8 if k > 4096 else 4,
        )  # fmt: skip
    return q, scale


def cases() -> list[Case]:
    signature = {"x_ptr": "*bf16", "small_ptr": "*fp32", "q_ptr": "*i8", "scale_ptr": "*fp32", "K": "i32", "stride": "i32", "factor": "fp32"}
    plain = Case("hadamard_quantize 4096", hadamard_quantize_kernel, signature, {"M": 1, "ROWS": 1, "POWER": 4096, "LOG": 12}, mma=False)
    # 576 = 36 · 16: exact float32 products, which no tensor core has
    paley = Case("hadamard_quantize 36 · 16", hadamard_quantize_kernel, signature, {"M": 36, "ROWS": 64, "POWER": 16, "LOG": 4}, mma=False)
    return [plain, paley]
