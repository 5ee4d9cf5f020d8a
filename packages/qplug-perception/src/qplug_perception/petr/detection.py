"""How good detections are: average precision by the distance of centres, as nuScenes counts it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qplug_perception.petr.boxes import Detections

DISTANCES = (0.5, 1.0, 2.0, 4.0)
_LEAST = 0.1  # recall and precision below it do not count, as in nuScenes


def average_precision(found: Sequence[Detections], boxes: Sequence[Tensor], labels: Sequence[Tensor], kind: int, distance: float) -> float:
    """Of one class at one distance in metres; NaN where the data holds no such box.

    found, boxes, labels: one entry a sample

    Detections are taken by falling score over all samples; each takes the nearest box of its class and sample that is free, in the plane of the
    ground, and is right where that lies within the distance.  The area is that of precision over recall above 0.1 each, scaled to 0 … 1.

    Source: the nuScenes detection task, https://www.nuscenes.org/object-detection, and its devkit's `accumulate` and `calc_ap`.
    """
    mine = [own[kinds == kind][:, :2] for own, kinds in zip(boxes, labels, strict=True)]
    total = sum(map(len, mine))
    if not total:
        return float("nan")
    rows = [
        (float(s), i, centre)
        for i, d in enumerate(found)
        for s, centre, label in zip(d.scores, d.boxes[:, :2], d.labels, strict=True)
        if int(label) == kind
    ]
    rows.sort(key=lambda row: -row[0])
    free = [torch.ones(len(own), dtype=torch.bool) for own in mine]
    hits = []
    for _, i, centre in rows:
        away = torch.where(free[i], (mine[i] - centre).norm(dim=1), torch.inf) if len(mine[i]) else torch.full((1,), torch.inf)
        best = int(away.argmin())
        right = float(away[best]) < distance
        if right:
            free[i][best] = False
        hits.append(right)
    if not any(hits):
        return 0.0
    right_so_far = torch.tensor(hits).double().cumsum(0)
    recall = right_so_far / total
    precision = right_so_far / torch.arange(1, len(hits) + 1)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    curve = _interpolated(grid, recall, precision)
    counted = curve[round(100 * _LEAST) + 1 :] - _LEAST
    return float(counted.clamp(min=0).mean() / (1 - _LEAST))


def mean_average_precision(
    found: Sequence[Detections], boxes: Sequence[Tensor], labels: Sequence[Tensor], classes: int, distances: Sequence[float] = DISTANCES
) -> float:
    """Mean over classes that occur, and distances."""
    values = [average_precision(found, boxes, labels, kind, d) for kind in range(classes) for d in distances]
    counted = [v for v in values if v == v]
    return sum(counted) / len(counted) if counted else float("nan")


def _interpolated(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Linear between the points, y[0] before them and 0 behind; where several have one x, the last counts."""
    last = torch.ones(len(x), dtype=torch.bool)
    last[:-1] = x[1:] != x[:-1]
    x, y = x[last], y[last]
    i = torch.searchsorted(x, at).clamp(0, len(x) - 1)
    before = (i - 1).clamp(min=0)
    span = (x[i] - x[before]).clamp(min=1e-12)
    value = torch.where(i == before, y[i], y[before] + (y[i] - y[before]) * ((at - x[before]) / span).clamp(0, 1))
    return torch.where(at > x[-1], 0.0, value)
