"""Weighted k-means over many small problems at once: deterministic, no random start."""

import torch
from torch import Tensor


def kmeans(points: Tensor, k: int, weight: Tensor | None = None, iterations: int = 25) -> Tensor:
    """Lloyd's algorithm from equally spaced points in Mahalanobis order; for one dimension the order is the value itself.

    points: [B, n, d]; weight: [B, n, d] or None, importance of each coordinate; → [B, k, d], sorted for d = 1
    A centroid that owns no point stays where it is.  Fewer than k points repeat their last.
    Source: GPTVQ, section 3.3, https://arxiv.org/abs/2402.15319 (Mahalanobis initialization).
    """
    b, n, d = points.shape
    order = _order(points).argsort(dim=1)  # [B, n]
    picks = torch.linspace(0, n - 1, 2 * k + 1, device=points.device)[1::2].round().long()  # the middles of k equal shares
    centers = points.gather(1, order[:, picks].unsqueeze(-1).expand(b, k, d)).clone()
    weight = torch.ones_like(points) if weight is None else weight
    for _ in range(iterations):
        owner = _nearest(points, centers, weight)  # [B, n]
        index = owner.unsqueeze(-1).expand(b, n, d)
        mass = torch.zeros_like(centers).scatter_add_(1, index, weight)
        total = torch.zeros_like(centers).scatter_add_(1, index, weight * points)
        moved = torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers.sort(dim=1).values if d == 1 else centers


def _order(points: Tensor) -> Tensor:
    """The quantity that sorts the points before the first centres are picked.  [B, n, d] → [B, n]"""
    if points.shape[-1] == 1:
        return points.squeeze(-1)
    centred = points - points.mean(1, keepdim=True)
    cov = centred.transpose(1, 2) @ centred / points.shape[1]
    eye = torch.eye(points.shape[-1], device=points.device)
    cov = cov + eye * cov.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)[:, None, None] * 1e-3
    return (centred @ torch.linalg.inv(cov) * centred).sum(-1)


def _nearest(points: Tensor, centers: Tensor, weight: Tensor) -> Tensor:
    """Index of the nearest centre by weighted squared distance, without a [B, n, k, d] array where d is 1."""
    if points.shape[-1] == 1:
        x, c = points.squeeze(-1).contiguous(), centers.squeeze(-1).sort(dim=1).values
        if torch.equal(c, centers.squeeze(-1)):
            return torch.searchsorted(((c[:, 1:] + c[:, :-1]) / 2).contiguous(), x)
    # Σ w (x - c)² = Σ w x² - 2 Σ (w x) c + Σ w c²; the first term does not matter
    return (weight @ centers.square().transpose(1, 2) - 2 * (weight * points) @ centers.transpose(1, 2)).argmin(-1)
