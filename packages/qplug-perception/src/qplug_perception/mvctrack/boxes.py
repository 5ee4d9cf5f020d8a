"""Rotated boxes [..., 7]: x, y, z of the centre, w, l, h, and the heading θ; l lies along θ, w across it.

Their intersection over union, and a tracker's Success and Precision.
"""

from collections.abc import Sequence
from typing import Any

import torch
from qcore.errors import SpecError
from torch import Tensor

THRESHOLDS = 21


def corners2d(box: Tensor) -> Tensor:
    """The footprint's corners, counter-clockwise.  [7] → [4, 2] float64"""
    x, y, _, w, length, _, theta = box.double()
    own = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]], dtype=torch.float64) * torch.stack([length, w])
    c, s = theta.cos(), theta.sin()
    return own @ torch.stack([torch.stack([c, s]), torch.stack([-s, c])]) + torch.stack([x, y])


def polygon_area(polygon: Tensor) -> float:
    """Of a simple polygon [n, 2], by the shoelace formula."""
    if len(polygon) < 3:
        return 0.0
    nxt = polygon.roll(-1, 0)
    return float((polygon[:, 0] * nxt[:, 1] - polygon[:, 1] * nxt[:, 0]).sum().abs() / 2)


def clipped(polygon: Tensor, by: Tensor) -> Tensor:
    """The part of a convex polygon [n, 2] inside another one, both counter-clockwise (Sutherland and Hodgman)."""
    for a, b in zip(by, by.roll(-1, 0), strict=True):
        if not len(polygon):
            break
        edge = b - a
        side = edge[0] * (polygon[:, 1] - a[1]) - edge[1] * (polygon[:, 0] - a[0])
        kept = []
        for i in range(len(polygon)):
            j = (i + 1) % len(polygon)
            if side[i] >= 0:
                kept.append(polygon[i])
            if (side[i] > 0 and side[j] < 0) or (side[i] < 0 and side[j] > 0):
                kept.append(polygon[i] + (polygon[j] - polygon[i]) * (side[i] / (side[i] - side[j])))
        polygon = torch.stack(kept) if kept else polygon[:0]
    return polygon


def iou3d(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes' volumes.  [7], [7]"""
    for box in (a, b):
        if box.shape != (7,) or bool((box[3:6] <= 0).any()):
            raise SpecError(f"a box is [7] with positive sides, got {box.tolist()}")
    area = polygon_area(clipped(corners2d(a), corners2d(b)))
    (za, ha), (zb, hb) = ((float(box[2]), float(box[5])) for box in (a, b))
    height = max(0.0, min(za + ha / 2, zb + hb / 2) - max(za - ha / 2, zb - hb / 2))
    both = area * height
    volumes = sum(float(box[3:6].double().prod()) for box in (a, b))
    return both / (volumes - both)


def success(overlaps: Sequence[float]) -> float:
    """100 times the area under the share of frames with IoU ≥ t, t = 0 … 1 in 21 steps, by trapezoids."""
    return _area(torch.tensor(list(overlaps), dtype=torch.float64), torch.linspace(0, 1, THRESHOLDS, dtype=torch.float64), above=True)


def precision(distances: Sequence[float], farthest: float = 2.0) -> float:
    """100 times the area under the share of frames whose centre is at most t off, t = 0 … 2 m in 21 steps, divided by 2 m."""
    return _area(torch.tensor(list(distances), dtype=torch.float64), torch.linspace(0, farthest, THRESHOLDS, dtype=torch.float64), above=False)


def _area(values: Tensor, at: Tensor, above: bool) -> float:
    if not len(values):
        raise SpecError("a track of no frames has no score")
    share = (values >= at.unsqueeze(1) if above else values <= at.unsqueeze(1)).double().mean(1)
    return float(100 * torch.trapezoid(share, at) / at[-1])


def inside(points: Tensor, box: Tensor, margin: float = 0.0) -> Tensor:
    """Which points [n, 3] lie in a box, grown by a margin on each side.  [n] bool"""
    w, length, h = box[3:6]
    own = to_box_frame(points[:, :3], box)
    return (own.abs() <= torch.stack([length, w, h]) / 2 + margin).all(1)


def to_box_frame(points: Tensor, box: Tensor) -> Tensor:
    """Points [n, 3] as the box sees them: x along its heading, y across, z up, from its centre."""
    away = points - box[:3]
    c, s = box[6].cos(), box[6].sin()
    return torch.stack([c * away[:, 0] + s * away[:, 1], c * away[:, 1] - s * away[:, 0], away[:, 2]], 1)


def shifted(box: Tensor, delta: Tensor) -> Tensor:
    """A box moved by (x, y, z) of its own frame; its heading and sides stay, as the release has it (use_rot=False)."""
    c, s = box[6].cos(), box[6].sin()
    step = torch.stack([c * delta[0] - s * delta[1], s * delta[0] + c * delta[1], delta[2]])
    return torch.cat([box[:3] + step, box[3:]])


def from_mmdet3d(boxes: Any) -> Tensor:
    """mmdet3d's LiDARInstance3DBoxes as [n, 7] here: theirs are (x, y, z of the *bottom*, dx, dy, dz, yaw), with dx along the heading.

    Any object with `gravity_center`, `dims` and `yaw` will do, so mmdet3d need not be installed.
    """
    lacks = [name for name in ("gravity_center", "dims", "yaw") if not hasattr(boxes, name)]
    if lacks:
        raise SpecError(f"{type(boxes).__name__} is none of mmdet3d's boxes: it has no {', '.join(lacks)}")
    dims = boxes.dims
    return torch.cat([boxes.gravity_center, dims[:, [1, 0, 2]], boxes.yaw.reshape(-1, 1)], 1)
