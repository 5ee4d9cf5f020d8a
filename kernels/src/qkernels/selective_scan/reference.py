"""Token by token, as the model is written down."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require


def require_operands(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None) -> None:
    """ValueError where the scans would not take them."""
    require("u", u, (None, None, None), FLOATING)
    b, t, d = u.shape
    require("delta", delta, (b, t, d), FLOATING, u)
    require("A", A, (d, None), FLOATING, u)
    n = A.shape[1]
    require("B", B, (b, t, n), FLOATING, u)
    require("C", C, (b, t, n), FLOATING, u)
    if start is not None:
        require("start", start, (b, d, n), FLOATING, u)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t,  y_t = h_t C_t

    u, delta: [B, T, D];  A: [D, N], negative;  B, C: [B, T, N];  start: [B, D, N], None = zeros
    return:   y [B, T, D], the last state [B, D, N]
    """
    require_operands(u, delta, A, B, C, start)
    h = u.new_zeros(u.shape[0], *A.shape) if start is None else start
    outputs = []
    for t in range(u.shape[1]):
        h = _step(h, u[:, t], delta[:, t], A, B[:, t])
        outputs.append((h @ C[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1), h


def selective_scan_int8(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_scale: Tensor, c_scale: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same with a readout in integers: the state itself stays float, what is read of it is rounded.

    h_scale, c_scale: one number each, the value of one step of the 8-bit codes of h and C
    """
    require_operands(u, delta, A, B, C, start)
    h = u.new_zeros(u.shape[0], *A.shape) if start is None else start
    outputs = []
    for t in range(u.shape[1]):
        h = _step(h, u[:, t], delta[:, t], A, B[:, t])
        outputs.append(int8_readout(h, C[:, t], h_scale, c_scale))
    return torch.stack(outputs, 1), h


def int8_readout(h: Tensor, c: Tensor, h_scale: Tensor, c_scale: Tensor) -> Tensor:
    """y_d = (Σ_n q(h_dn) q(c_n)) · h_scale · c_scale, q rounding to -128 … 127; the sum is exact: N · 2^14 < 2^31 for N < 2^17

    h: [..., D, N];  c: [..., N] → [..., D] float32
    """
    codes_h, codes_c = ((x.float() / s).round().clamp(-128, 127).to(torch.int32) for x, s in ((h, h_scale), (c, c_scale)))
    total = (codes_h * codes_c.unsqueeze(-2)).sum(-1, dtype=torch.int32)
    return total.float() * (h_scale * c_scale)


def _step(h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.exp(delta.unsqueeze(-1) * A) * h + (delta * u).unsqueeze(-1) * B.unsqueeze(-2)
