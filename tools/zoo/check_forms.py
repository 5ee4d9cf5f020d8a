"""Compare the fast training forms with their sequential references: outputs and gradients on random inputs.

Run: ``python tools/zoo/check_forms.py`` (compiles the Mamba scan; about a minute).
"""

from __future__ import annotations

import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from mamba_scan import selective_scan
from rwkv7 import wkv7_chunked, wkv7_sequential

TOLERANCE = 1e-4


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference in the Euclidean norm."""
    return float((got - expected).detach().norm() / expected.detach().norm())


def worst(fast: list[torch.Tensor], reference: list[torch.Tensor], inputs: list[torch.Tensor]) -> tuple[float, float]:
    """The largest relative differences of outputs and of gradients of a fixed random projection."""
    weights = [torch.randn_like(x) for x in reference]
    ours = torch.autograd.grad(sum((x * w).sum() for x, w in zip(fast, weights, strict=True)), inputs)
    theirs = torch.autograd.grad(sum((x * w).sum() for x, w in zip(reference, weights, strict=True)), inputs)
    outputs = max(relative(x, y) for x, y in zip(fast, reference, strict=True))
    return outputs, max(relative(x, y) for x, y in zip(ours, theirs, strict=True))


def check_rwkv() -> tuple[float, float]:
    """RWKV-7's chunked state update; a length that is no multiple of the chunk."""
    r, w, k, v, kk, rate = (torch.randn(2, 3, 45, 64) for _ in range(6))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    inputs = [r, -0.6065 * torch.sigmoid(w), k, v, -kk, kk * torch.sigmoid(rate)]
    inputs = [x.requires_grad_() for x in inputs]
    return worst([wkv7_chunked(*inputs)], [wkv7_sequential(*inputs)], inputs)


def check_mamba() -> tuple[float, float]:
    """Mamba's selective scan against transformers' loop."""
    batch, channels, states, length = 2, 32, 16, 64
    u, dt, z = (torch.randn(batch, channels, length) for _ in range(3))
    b, c = (torch.randn(batch, states, length) for _ in range(2))
    a, d, bias = -torch.rand(channels, states) * 8, torch.randn(channels), torch.randn(channels) - 2
    inputs = [x.requires_grad_() for x in (u, dt, a, b, c, d, z, bias)]
    fast = selective_scan(*inputs, delta_softplus=True)
    reference = mamba_selective_scan(u, dt, a, b, c, D=d, z=z, delta_bias=bias, delta_softplus=True)
    return worst([fast], [reference], inputs)


def main() -> None:
    """Print the differences; fail if one is not small."""
    torch.manual_seed(0)
    for name, check in (("rwkv7 chunked against sequential", check_rwkv), ("mamba scan against transformers", check_mamba)):
        outputs, gradients = check()
        print(f"{name}: relative difference of outputs {outputs:.2e}, of gradients {gradients:.2e}")
        if max(outputs, gradients) > TOLERANCE:
            raise SystemExit(f"{name}: too large")


if __name__ == "__main__":
    main()
