"""How uniform are the values of a weight?  RWKVQuant's coarse and fine proxies, from the gaps between sorted values.

With G the gaps between neighbours of the sorted values, divided by their sum, n of them:

    coarse  P_c = ln n - H(G) = ln n + Σ G ln G                  0 for an equispaced grid
    fine    P_f = Σ_{k=2..K} n^k / (k (k-1)) · |(1/n) Σ (G - 1/n)^k|     P_c's expansion about the grid, moment by moment

Uniform numbers give P_c → 1 - γ = 0.4228 and P_f → 1/2 + 1/3 + 3/4 = 1.5833; heavy tails and outliers give more.  Both grow with n for all but
uniform numbers, so values are first thinned to a fixed number of order statistics: weights of different sizes can be compared then.

Source: https://arxiv.org/abs/2505.03803, section 3.1.  The released code drops gaps that occur twice (`unique_gaps` does so too), which makes uniform
bfloat16 numbers look far from uniform; the thresholds in the paper (1.54 and 30) mean something with that, on 16-bit weights, and nowhere else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ORDER_STATISTICS = 65536


@dataclass(frozen=True)
class Proxies:
    """coarse and fine are 0 for a grid;  crest: max |w| · √numel / ‖w‖, the rule of the released code"""

    coarse: float
    fine: float
    crest: float


def proxies(weight: Tensor, *, order: int = 4, statistics: int | None = ORDER_STATISTICS, unique_gaps: bool = False) -> Proxies:
    """Of all values of one weight, in float64; 0 for fewer than three values or all of one value.

    order:       K, the highest moment of the fine proxy
    statistics:  how many evenly spaced order statistics are kept; None = all
    unique_gaps: drop zero gaps and repeated ones, as the released code does
    """
    values = weight.detach().double().flatten().sort().values
    crest = float(values.abs().max() * values.numel() ** 0.5 / values.norm().clamp(min=1e-300)) if values.numel() else 0.0
    if statistics is not None and values.numel() > statistics:
        values = values[torch.linspace(0, values.numel() - 1, statistics, dtype=torch.float64).round().long()]
    gaps = values.diff()
    if unique_gaps:
        gaps = gaps.unique()
        gaps = gaps[gaps > 0]
    total = gaps.sum()
    if gaps.numel() < 2 or not total > 0:
        return Proxies(0.0, 0.0, crest)
    g, n = gaps / total, gaps.numel()
    coarse = torch.log(torch.tensor(float(n), dtype=torch.float64)) + torch.special.xlogy(g, g).sum()
    # in units of 1/n the moments neither under- nor overflow
    centred = g * n - 1
    fine = sum(float(centred.pow(k).mean().abs()) / (k * (k - 1)) for k in range(2, order + 1))
    return Proxies(max(float(coarse), 0.0), fine, crest)
