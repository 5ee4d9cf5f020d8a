"""QSUR: how much of the space that a quantizer covers the data fill.  A diagnosis; nothing is optimised for it.

For rows x ~ N(μ, Σ) of d channels, the volume of the ellipsoid that holds a share α of them, over that of the cube whose edge is the range of all
coordinates: what one scale for a whole row must cover.

    QSUR = V_X / V_S,   V_X = π^(d/2) / Γ(d/2 + 1) · c^(d/2) · √det Σ,   V_S = (max_j(μ_j + √(c Σ_jj)) - min_j(μ_j - √(c Σ_jj)))^d,   c = χ²_d(α)

Volumes of d dimensions say nothing to anyone, so log QSUR / d is given.  It does not change when everything is scaled, and has its maximum where all
directions have the same variance and the mean is zero (`bound`).

Source: https://arxiv.org/abs/2501.13987 (OSTQuant), section 3.1.  Differs: the paper takes the cube's edge from the end points of the principal axes;
the extreme of coordinate j over the ellipsoid is μ_j ± √(c Σ_jj).
"""

import math

import torch
from torch import Tensor


def log_qsur(mean: Tensor, covariance: Tensor, alpha: float = 0.99) -> float:
    """log QSUR / d; -inf where some direction has no variance.  mean: [d];  covariance: [d, d]"""
    d, cov, mu = mean.shape[0], covariance.double(), mean.double()
    eigen = torch.linalg.eigvalsh(cov)
    if bool(eigen[0] <= 0):
        return -math.inf
    c = chi_square(d, alpha)
    reach = (c * cov.diagonal()).sqrt()
    edge = float((mu + reach).max() - (mu - reach).min())
    volume = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1) + d / 2 * math.log(c) + 0.5 * float(eigen.log().sum())
    return volume / d - math.log(edge)


def bound(d: int) -> float:
    """The largest log QSUR / d: log((π^(d/2) / Γ(d/2 + 1))^(1/d) / 2)."""
    return (d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)) / d - math.log(2)


def chi_square(d: int, alpha: float) -> float:
    """The α quantile of χ² with d degrees of freedom, by bisection of the regularized incomplete gamma function."""
    low, high = 0.0, d + 40 * math.sqrt(2 * d) + 100
    half, target = torch.tensor(d / 2, dtype=torch.float64), alpha
    for _ in range(100):
        middle = (low + high) / 2
        below = float(torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64))) < target
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2
