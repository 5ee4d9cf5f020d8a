"""The rotation as a matrix product, then `quantize_rows`."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require
from qkernels.quantize_rows.reference import quantize_rows


def sylvester(n: int) -> Tensor:
    """The Hadamard matrix of a power of two, by Sylvester's rule.  [n, n] float32, entries ±1"""
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def rotate(x: Tensor, small: Tensor | None = None) -> Tensor:
    """x @ (small ⊗ Sylvester)ᵀ / √K, in float32.

    x:     [T, K] float
    small: [m, m] a Hadamard matrix of another size (Paley), for K = m · 2^p; None = 1 × 1
    """
    require("x", x, (None, None), FLOATING)
    small = torch.ones(1, 1, device=x.device) if small is None else small
    m = small.shape[0]
    require("small", small, (m, m), FLOATING, x)
    small = small.float()
    power = x.shape[1] // m
    if power * m != x.shape[1] or power & (power - 1) or not power:
        raise ValueError(f"x: has K={x.shape[1]} with a small matrix of {m}; allowed: K = m · 2^p")
    big = torch.kron(small, sylvester(power).to(x.device))
    return x.float() @ big.T / x.shape[1] ** 0.5


def hadamard_quantize(x: Tensor, small: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes [T, K] int8, scale [T, 1] float32) of the rotated rows; see `rotate` and `quantize_rows`."""
    return quantize_rows(rotate(x, small))
