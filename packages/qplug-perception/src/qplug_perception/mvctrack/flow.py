"""Residual log-likelihood: the error of a regression, measured by a density that is learned beside it.

    x̄ = (truth - μ) / σ,   loss = Σ log σ - log G(x̄) + log(2σ) + |x̄|

G is a normalizing flow (RealNVP) from a unit Gaussian, and the last two terms are the Laplace density that it is a residual of.

Source: https://arxiv.org/abs/2107.11291 (Li et al. 2021), equations 8 to 10; RealNVP: https://arxiv.org/abs/1605.08803, section 3.
"""

import math

import torch
from torch import Tensor, nn


class RealNVP(nn.Module):
    """A density over R³: couplings that scale and shift some coordinates by functions of the others."""

    masks: Tensor

    def __init__(self, dimensions: int = 3, hidden: int = 64, pairs: int = 3) -> None:
        super().__init__()
        one = torch.arange(dimensions) % 2 == 0
        self.register_buffer("masks", torch.stack([one, ~one] * pairs).float(), persistent=False)
        self.scale = nn.ModuleList(self._net(dimensions, hidden, nn.Tanh()) for _ in range(2 * pairs))
        self.shift = nn.ModuleList(self._net(dimensions, hidden, nn.Identity()) for _ in range(2 * pairs))

    @staticmethod
    def _net(dimensions: int, hidden: int, end: nn.Module) -> nn.Sequential:
        layers = [nn.Linear(dimensions, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, dimensions), end]
        return nn.Sequential(*layers)

    def to_base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the point of the unit Gaussian that x comes from, log |det| of that map).  [n, 3] → [n, 3], [n]"""
        log_det = x.new_zeros(len(x))
        for i in reversed(range(len(self.masks))):
            mask = self.masks[i]
            fixed = mask * x
            s, t = self.scale[i](fixed) * (1 - mask), self.shift[i](fixed) * (1 - mask)
            x = fixed + (1 - mask) * (x - t) * torch.exp(-s)
            log_det = log_det - s.sum(1)
        return x, log_det

    def from_base(self, z: Tensor) -> Tensor:
        """The inverse of `to_base`."""
        for i, mask in enumerate(self.masks):
            fixed = mask * z
            s, t = self.scale[i](fixed) * (1 - mask), self.shift[i](fixed) * (1 - mask)
            z = fixed + (1 - mask) * (z * torch.exp(s) + t)
        return z

    def log_density(self, x: Tensor) -> Tensor:
        """[n, 3] → [n]"""
        z, log_det = self.to_base(x)
        return log_det - 0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def residual_log_likelihood(mean: Tensor, sigma: Tensor, truth: Tensor, flow: RealNVP) -> Tensor:
    """The mean loss of predictions.  mean, sigma, truth: [n, 3], sigma > 0"""
    error = (truth - mean) / sigma
    learned = torch.log(sigma).sum(1) - flow.log_density(error)
    laplace = (torch.log(2 * sigma) + error.abs()).sum(1)
    return (learned + laplace).mean()
