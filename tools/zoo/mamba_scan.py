"""A fast selective scan for training Mamba on a CPU, in plain torch operations, with its gradient written out.

transformers' fallback materializes the discretized tensors [batch, channels, time, states] and loops over time under autograd.
Here the scan walks over chunks of time, keeps only the state at each chunk's start for the backward pass, and recomputes the
rest; both chunk functions are compiled by ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers.models.mamba import modeling_mamba

CHUNK = 16


def _forward_chunk(
    state: torch.Tensor, u: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, B, D] and the last state [B, D, N] of one chunk; u, dt: [T, B, D]; a: [D, N]; b, c: [T, B, N]."""
    outputs = []
    for t in range(u.shape[0]):
        state = torch.exp(dt[t].unsqueeze(-1) * a) * state + (dt[t] * u[t]).unsqueeze(-1) * b[t].unsqueeze(1)
        outputs.append((state * c[t].unsqueeze(1)).sum(-1))
    return torch.stack(outputs), state


def _backward_chunk(
    state: torch.Tensor,
    grad_state: torch.Tensor,
    grad_y: torch.Tensor,
    u: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The gradients of one chunk, given its first state and the gradient at its last; the states are computed anew."""
    states = [state]
    for t in range(u.shape[0]):
        decay = torch.exp(dt[t].unsqueeze(-1) * a)
        states.append(decay * states[-1] + (dt[t] * u[t]).unsqueeze(-1) * b[t].unsqueeze(1))
    grad_a = torch.zeros_like(grad_state)
    grad_u, grad_dt, grad_b, grad_c = [], [], [], []
    for t in reversed(range(u.shape[0])):
        grad_state = grad_state + grad_y[t].unsqueeze(-1) * c[t].unsqueeze(1)
        grad_c.append((grad_y[t].unsqueeze(-1) * states[t + 1]).sum(1))
        grad_b.append((grad_state * (dt[t] * u[t]).unsqueeze(-1)).sum(1))
        along_b = (grad_state * b[t].unsqueeze(1)).sum(-1)
        decay = torch.exp(dt[t].unsqueeze(-1) * a)
        grad_exponent = grad_state * states[t] * decay
        grad_a = grad_a + grad_exponent * dt[t].unsqueeze(-1)
        grad_u.append(dt[t] * along_b)
        grad_dt.append((grad_exponent * a).sum(-1) + u[t] * along_b)
        grad_state = grad_state * decay
    lists = [torch.stack(items[::-1]) for items in (grad_u, grad_dt, grad_b, grad_c)]
    return grad_state, grad_a.sum(0), *lists


_forward_fast = torch.compile(_forward_chunk, dynamic=False)
_backward_fast = torch.compile(_backward_chunk, dynamic=False)


class _Scan(torch.autograd.Function):
    """h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t;  y_t = <h_t, c_t>; time first, float32."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        state = u.new_zeros(u.shape[1], u.shape[2], a.shape[1])
        outputs, starts = [], []
        for first in range(0, u.shape[0], CHUNK):
            part = slice(first, first + CHUNK)
            starts.append(state)
            y, state = _forward_fast(state, u[part], dt[part], a, b[part], c[part])
            outputs.append(y)
        ctx.save_for_backward(u, dt, a, b, c, torch.stack(starts))
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, dt, a, b, c, starts = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_state, grad_a = torch.zeros_like(starts[0]), torch.zeros_like(a)
        grads = [torch.empty_like(x) for x in (u, dt, b, c)]
        for number in reversed(range(len(starts))):
            part = slice(number * CHUNK, (number + 1) * CHUNK)
            grad_state, part_a, *parts = _backward_fast(starts[number], grad_state, grad_y[part], u[part], dt[part], a, b[part], c[part])
            grad_a += part_a
            for whole, piece in zip(grads, parts, strict=True):
                whole[part] = piece
        return grads[0], grads[1], grad_a, grads[2], grads[3]


def selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    delta_softplus: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    """The replacement of transformers' ``mamba_selective_scan`` in training; the same arguments, [batch, channels, time]."""
    with torch.autocast("cpu", enabled=False):
        u = hidden_states.float().permute(2, 0, 1).contiguous()
        steps = dt.float() + delta_bias[..., None]
        steps = (functional.softplus(steps) if delta_softplus else steps).permute(2, 0, 1).contiguous()
        y = _Scan.apply(u, steps, A.contiguous(), B.float().permute(2, 0, 1).contiguous(), C.float().permute(2, 0, 1).contiguous())
        return ((y + u * D).permute(1, 2, 0) * functional.silu(z.float())).to(hidden_states.dtype)


@contextmanager
def fast_scan() -> Iterator[None]:
    """Within this context, transformers' Mamba uses ``selective_scan`` instead of its own loop."""
    original = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = selective_scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = original
