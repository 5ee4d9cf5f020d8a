"""Rounding of integers, in one place: most defects found in third-party integer models are of rounding, of negative operands, or of lost bits.

Everything takes and gives int64 tensors, elementwise and broadcasting, and is exact: no operation here passes through a float, so what is computed
for a row does not depend on its neighbours, on the number of threads, or on the machine.  One rule everywhere: to nearest, halves away from zero.

Domain: |a| < 2^63 (the one integer without a negative, -2^63, is left out).
"""

import torch
from torch import Tensor

INT64_MAX = 2**63 - 1


def divide_half_away(a: Tensor, b: Tensor | int) -> Tensor:
    """round(a / b), halves away from zero: 5/2 → 3, -5/2 → -3.  b > 0

    The usual (a + b/2) // b rounds -5/2 to -2, and its sum overflows near the end of the range.
    """
    magnitude = a.abs()
    quotient = torch.div(magnitude, b, rounding_mode="floor")
    rest = magnitude - quotient * b
    return (quotient + (rest >= b - rest).long()) * a.sign()


def divide_floor(a: Tensor, b: Tensor | int) -> Tensor:
    """⌊a / b⌋ for operands of any sign: -7/2 → -4, 7/-2 → -4.  b ≠ 0

    C's `/` truncates, -7/2 → -3, which is what a literal translation of a paper's ⌊ ⌋ gets wrong.
    """
    return torch.div(a, b, rounding_mode="floor")


def shift_right(a: Tensor, n: Tensor | int) -> Tensor:
    """round(a / 2^n), halves away from zero; n < 0 shifts to the left, where the caller answers for |a|·2^-n < 2^63."""
    n = torch.as_tensor(n)
    magnitude = a.abs()
    right = n.clamp(1, 63)
    # beyond 63 every magnitude is below a half; at 63 one from 2^62 on rounds to 1
    rounded = torch.where(n > 63, 0, ((magnitude >> (right - 1)) + 1) >> 1)
    # at n = 1 the sum above needs |a| < 2^63 - 1
    rounded = torch.where(n == 1, (magnitude >> 1) + (magnitude & 1), rounded)
    return torch.where(n > 0, rounded, magnitude << (-n).clamp(0, 63)) * a.sign()


def shift_floor(a: Tensor, n: Tensor | int) -> Tensor:
    """⌊a / 2^n⌋, the arithmetic shift of two's complement: -1 >> 5 = -1.  n ≥ 0; from 63 on only the sign is left"""
    return a >> torch.as_tensor(n).clamp(max=63)


def msb(a: Tensor) -> Tensor:
    """Position of the highest set bit, ⌊log2 a⌋; -1 for 0.  a ≥ 0"""
    position, rest = torch.zeros_like(a), a
    for step in (32, 16, 8, 4, 2, 1):
        high = rest >= 1 << step
        position = position + high.long() * step
        rest = torch.where(high, rest >> step, rest)
    return torch.where(a > 0, position, -1)


def log2_floor(a: Tensor | int, b: Tensor) -> Tensor:
    """⌊log2(a / b)⌋ of positive integers, negative where a < b: the MSB position of an integer quotient, no logarithm."""
    a = torch.as_tensor(a).expand_as(b)
    up = msb(divide_floor(a, b))
    # a < b: -⌈log2(b / a)⌉, and ⌈log2 x⌉ = bits of (⌈x⌉ - 1)
    down = msb(divide_floor(b - 1, a)) + 1
    return torch.where(a >= b, up, -down)


def isqrt(a: Tensor) -> Tensor:
    """⌊√a⌋, one binary digit at a time (I-LLM, algorithm 4): 32 comparisons and subtractions, no division and no start value.  0 ≤ a < 2^63

    Newton's iteration, the usual other way, divides in every step and needs a proof that it stops; a float square root is wrong above 2^52.
    """
    rest, root = a, torch.zeros_like(a)
    for digit in range(62, -1, -2):
        bit = 1 << digit
        fits = rest >= root + bit
        rest = torch.where(fits, rest - root - bit, rest)
        root = torch.where(fits, (root >> 1) + bit, root >> 1)
    return root
