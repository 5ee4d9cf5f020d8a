"""Hadamard matrices from Sylvester's and Paley's constructions: H Hᵀ = n·I, entries ±1, no pasted tables.

n = k·2^a with a core of order k from Paley I (k = q+1, q ≡ 3 mod 4) or Paley II (k = 2(q+1), q ≡ 1 mod 4), q a prime, its square or its cube: 12, 20,
28, 36, 44, 60, 76, 108, 140, 148, 344 (q = 7³; 11008 = 344·2^5), 924 and so on.  A core is multiplied densely, so orders above 1024 are not used.
Sizes that none reaches (13696) are padded with zeros to a size that one does: `padded_size`.
Source: R. E. A. C. Paley, On orthogonal matrices (1933), lemmas 2 and 3.
"""

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from qcore.errors import SpecError

_LARGEST_CORE = 1024


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with q = p^m, p an odd prime and m ≤ 3; None when there are none."""
    for m in (1, 2, 3):
        p = round(q ** (1 / m))
        if p**m == q and p > 2 and _is_prime(p):
            return p, m
    return None


def core_size(n: int) -> int | None:
    """The smallest k with n = k·2^a for which a k × k matrix is known here: 1 for powers of two; None when there is none."""
    if n < 1:
        return None
    k = n & -n  # the largest power of two in n
    odd = n // k
    if odd == 1:
        return 1
    return next((odd * 2**i for i in range(k.bit_length()) if odd * 2**i <= _LARGEST_CORE and _paley_field(odd * 2**i)), None)


def _paley_field(k: int) -> int | None:
    """The order q of the field behind an order-k matrix: q = k-1 (Paley I) or q = k/2-1 (Paley II); None when there is none."""
    if k % 4:
        return None
    if k % 4 == 0 and _prime_power(k - 1):
        return k - 1
    q = k // 2 - 1
    return q if q % 4 == 1 and _prime_power(q) else None


def padded_size(n: int) -> int:
    """n itself where a Hadamard matrix of that size is known here, else the next size above that has one: 13696 → 13824.

    Padded sizes are multiples of 128 (a smaller power of two below 4096, so that the price is a few per cent): the usual groups divide them.
    """
    if core_size(n) is not None:
        return n
    step = min(128, 1 << max(0, (n // 32).bit_length() - 1))
    size = -(-n // step) * step
    while core_size(size) is None:
        size += step
    return size


@lru_cache(maxsize=16)
def _core(k: int) -> Tensor:
    """A k × k Hadamard matrix by Paley's constructions, float64."""
    if k == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = _paley_field(k)
    assert q is not None, k
    jacobsthal = _jacobsthal(q)
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


def _jacobsthal(q: int) -> Tensor:
    """χ(a - b) for all elements a, b of the field of q elements: 1 for squares, -1 for others, 0 for zero.  [q, q] float64"""
    field = _prime_power(q)
    assert field is not None, q
    p, m = field
    elements = list(product(range(p), repeat=m))  # coefficients of 1, x, x²; the order of the elements is their order here
    zero, modulus = elements[0], _irreducible(p, m)
    squares = {_multiply(a, a, modulus, p) for a in elements[1:]}
    chi = torch.tensor([0.0 if a == zero else 1.0 if a in squares else -1.0 for a in elements], dtype=torch.float64)
    digits = torch.tensor(elements)
    place = torch.tensor([p**i for i in reversed(range(m))])
    return chi[((digits[:, None] - digits[None, :]) % p * place).sum(-1)]


def _irreducible(p: int, m: int) -> tuple[int, ...]:
    """c with x^m = Σ c_i x^i in the field of p^m elements: the first for which x^m - Σ c_i x^i has no root, which suffices up to m = 3."""
    if m == 1:
        return (0,)
    return next(c for c in product(range(p), repeat=m) if all((r**m - sum(ci * r**i for i, ci in enumerate(c))) % p for r in range(p)))


def _multiply(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    """The product of two polynomials modulo x^m = Σ modulus_i x^i, coefficients modulo p."""
    m = len(a)
    c = [0] * (2 * m - 1)
    for i, j in product(range(m), repeat=2):
        c[i + j] += a[i] * b[j]
    for top in range(2 * m - 2, m - 1, -1):
        for i in range(m):
            c[top - m + i] += c[top] * modulus[i]
    return tuple(v % p for v in c[:m])


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
