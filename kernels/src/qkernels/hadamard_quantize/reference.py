"""The rotation as a matrix product, then `quantize_rows`."""

import torch
from torch import Tensor

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
    small = torch.ones(1, 1) if small is None else small.float()
    m = small.shape[0]
    power = x.shape[1] // m
    big = torch.kron(small, sylvester(power)).to(x.device)
    return x.float() @ big.T / x.shape[1] ** 0.5


def hadamard_quantize(x: Tensor, small: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes [T, K] int8, scale [T, 1] float32) of the rotated rows; see `rotate` and `quantize_rows`."""
    return quantize_rows(rotate(x, small))
