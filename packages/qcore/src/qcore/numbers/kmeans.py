"""Weighted k-means over many small problems at once: deterministic, no random start."""

import torch
from torch import Tensor


def kmeans(points: Tensor, k: int, weight: Tensor | None = None, iterations: int = 25) -> Tensor:
    """Lloyd's algorithm from equally spaced points in Mahalanobis order; for one dimension the order is the value itself.

    points: [B, n, d]; weight: [B, n, d] or None, importance of each coordinate; → [B, k, d], sorted for d = 1
    Points of weight 0 are not there.  A centroid that owns no point moves to the point that errs most, if any errs: so up to k distinct points are
    kept exactly, given iterations enough.  The weighted loss never rises.
    Source: GPTVQ, section 3.3, https://arxiv.org/abs/2402.15319 (Mahalanobis initialization).
    """
    b, n, d = points.shape
    weight = torch.ones_like(points) if weight is None else weight
    centers = _first_centers(points, k, weight)
    lifted = torch.cat([weight * points, weight], -1)
    for _ in range(iterations):
        owner = _nearest(points, centers, lifted)  # [B, n]
        index = owner.unsqueeze(-1).expand(b, n, d)
        mass = torch.zeros_like(centers).scatter_add_(1, index, weight)
        total = torch.zeros_like(centers).scatter_add_(1, index, weight * points)
        moved = torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), centers)
        idle = mass.sum(-1) == 0  # [B, k]
        if idle.any():
            moved = _to_the_worst(points, moved, weight, index, idle)
        if d == 1:
            moved = moved.sort(dim=1).values
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers


def _first_centers(points: Tensor, k: int, weight: Tensor) -> Tensor:
    """The middles of k equal shares of the points that have weight, in Mahalanobis order.  → [B, k, d]"""
    b, _, d = points.shape
    there = (weight > 0).any(-1)  # [B, n]
    order = torch.where(there, _order(points, there), torch.inf).argsort(dim=1, stable=True)
    middles = (torch.arange(k, device=points.device, dtype=torch.float64) + 0.5) / k
    picks = (middles * (there.sum(1, keepdim=True) - 1).clamp(min=0)).round().long()  # [B, k]
    return points.gather(1, order.gather(1, picks).unsqueeze(-1).expand(b, k, d)).clone()


def _to_the_worst(points: Tensor, centers: Tensor, weight: Tensor, owner: Tensor, idle: Tensor) -> Tensor:
    """Move the j-th idle centre of each problem to the point with the j-th largest weighted error; where none errs it stays."""
    error = (weight * (points - centers.gather(1, owner)).square()).sum(-1)  # [B, n]
    count = min(centers.shape[1], points.shape[1])
    worst, where = error.topk(count, dim=1)
    rank = (idle.cumsum(1) - 1).clamp(0, count - 1)  # [B, k]
    target = points.gather(1, where.gather(1, rank).unsqueeze(-1).expand_as(centers))
    moves = idle & (worst.gather(1, rank) > 0)
    return torch.where(moves.unsqueeze(-1), target, centers)


def _order(points: Tensor, there: Tensor) -> Tensor:
    """The quantity that sorts the points before the first centres are picked.  [B, n, d] → [B, n]"""
    if points.shape[-1] == 1:
        return points.squeeze(-1)
    n = there.sum(1).clamp(min=1)[:, None, None]
    centred = (points - (points * there.unsqueeze(-1)).sum(1, keepdim=True) / n) * there.unsqueeze(-1)
    cov = centred.transpose(1, 2) @ centred / n
    eye = torch.eye(points.shape[-1], device=points.device)
    cov = cov + eye * cov.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)[:, None, None] * 1e-3
    return (centred @ torch.linalg.inv(cov) * centred).sum(-1)


def _nearest(points: Tensor, centers: Tensor, lifted: Tensor) -> Tensor:
    """Index of the nearest centre by weighted squared distance, without a [B, n, k, d] array.  For d = 1 the centres are sorted.

    lifted: [B, n, 2d], the weighted points and their weights
    """
    if points.shape[-1] == 1:
        c = centers.squeeze(-1)
        return torch.searchsorted(((c[:, 1:] + c[:, :-1]) / 2).contiguous(), points.squeeze(-1).contiguous())
    # Σ w (x - c)² = Σ w x² - 2 Σ (w x) c + Σ w c²; the first term does not matter
    return (lifted @ torch.cat([-2 * centers, centers.square()], -1).transpose(1, 2)).argmin(-1)
