"""Hadamard matrices from Sylvester's and Paley's constructions: H Hᵀ = n·I, entries ±1, no pasted tables.

n = k·2^a with k from Paley I (k = q+1, q prime, q ≡ 3 mod 4) or Paley II (k = 2(q+1), q prime, q ≡ 1 mod 4): 12, 20, 28, 36, 44, 60, 76, 108, 140,
148, 924 and so on.  Sizes that none reaches (13696) are padded with zeros to the next that one does: `padded_size`.
Source: R. E. A. C. Paley, On orthogonal matrices (1933), lemmas 2 and 3.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qcore.errors import SpecError


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def core_size(n: int) -> int | None:
    """The smallest k with n = k·2^a for which a k × k matrix is known here: 1 for powers of two; None when there is none."""
    if n < 1:
        return None
    k = n
    while k % 2 == 0:
        k //= 2
    if k == 1:
        return 1
    while n % k == 0:
        if k % 4 == 0 and (_paley_prime(k) is not None):
            return k
        k *= 2
    return None


def _paley_prime(k: int) -> int | None:
    """The prime behind an order-k matrix: q = k-1 (Paley I) or q = k/2-1 (Paley II)."""
    if _is_prime(k - 1) and (k - 1) % 4 == 3:
        return k - 1
    if k % 2 == 0 and _is_prime(k // 2 - 1) and (k // 2 - 1) % 4 == 1:
        return k // 2 - 1
    return None


def padded_size(n: int) -> int:
    """The smallest size ≥ n for which a Hadamard matrix is known here."""
    size = n
    while core_size(size) is None:
        size += 1
    return size


@lru_cache(maxsize=16)
def _core(k: int) -> Tensor:
    """A k × k Hadamard matrix by Paley's constructions, float64."""
    if k == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = _paley_prime(k)
    assert q is not None, k
    squares = {(i * i) % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    i = torch.arange(q)
    jacobsthal = chi[(i[:, None] - i[None, :]) % q]
    eye = torch.eye(q + 1, dtype=torch.float64)
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:] = 1
    border[1:, 1:] = jacobsthal
    if k == q + 1:
        border[1:, 0] = -1
        return eye + border
    border[1:, 0] = 1
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, plus) + torch.kron(eye, minus)


def hadamard(n: int, *, normalize: bool = True) -> Tensor:
    """The n × n matrix H = H_k ⊗ H_{2^a}, float64; orthogonal when normalized (divided by √n).

    SpecError when no construction reaches n; `padded_size(n)` says which size does.
    """
    k = core_size(n)
    if k is None:
        raise SpecError(f"no Hadamard matrix of size {n} by Sylvester's or Paley's constructions; pad with zeros to {padded_size(n)}")
    h = _core(k)
    while h.shape[0] < n:
        # append on the right: H_k ⊗ (H_2 ⊗ …), so that `transform` may do the power of two first
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return h / n**0.5 if normalize else h


def transform(x: Tensor) -> Tensor:
    """x @ Hᵀ along the last axis in O(n log n), for H = `hadamard(n)`.  [..., n] → [..., n], same dtype

    For symmetric H (all powers of two, all Paley II) this is also x @ H.
    """
    n = x.shape[-1]
    k = core_size(n)
    if k is None:
        raise SpecError(f"no Hadamard matrix of size {n} by Sylvester's or Paley's constructions; pad with zeros to {padded_size(n)}")
    shape = x.shape
    y = x.reshape(-1, k, n // k)
    width = 1
    while width < n // k:
        y = y.reshape(-1, k, n // k // (2 * width), 2, width)
        y = torch.stack((y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]), dim=-2)
        width *= 2
    y = y.reshape(-1, k, n // k)
    if k > 1:
        y = _core(k).to(y) @ y
    return (y / n**0.5).reshape(shape)


def random_signs(n: int, seed: int) -> Tensor:
    """n signs ±1, float64, from their own generator: the diagonal that makes a Hadamard rotation random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
