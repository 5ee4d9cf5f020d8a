"""RayIoU: rays of a LiDAR are cast into the predicted and the true voxels, and what they meet first is compared.

Unlike the IoU of voxels it does not reward a surface for being thick.  SparseOcc's README warns that training with the camera-visible mask does
exactly that, and inflates mIoU: the mask has no place here.

Source: https://arxiv.org/abs/2312.17118 (SparseOcc), section 4.1, and the rays of its code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from qcore.errors import SpecError
from torch import Tensor

from qplug_perception.gsrender.geometry import VoxelGrid

THRESHOLDS = (1.0, 2.0, 4.0)
_HIGHEST = 0.21  # rad, the upper edge of nuScenes' LiDAR


def lidar_rays(azimuths: int = 360) -> Tensor:
    """Directions of SparseOcc's rays: pitches -(π/2 - atan k), k = 1 … 10, then on by the last increment up to 0.21 rad.  [pitches · azimuths, 3]

    azimuths: 360 is one for each degree
    """
    pitches = [-(math.pi / 2 - math.atan(k)) for k in range(1, 11)]
    while pitches[-1] < _HIGHEST:
        pitches.append(2 * pitches[-1] - pitches[-2])
    pitch = torch.tensor(pitches, dtype=torch.float64).unsqueeze(1)
    turn = torch.arange(azimuths, dtype=torch.float64) * (2 * math.pi / azimuths)
    rays = torch.stack([pitch.cos() * turn.cos(), pitch.cos() * turn.sin(), pitch.sin().expand(-1, azimuths)], -1)
    return rays.reshape(-1, 3).float()


def cast(labels: Tensor, grid: VoxelGrid, origins: Tensor, directions: Tensor, free: int) -> tuple[Tensor, Tensor]:
    """The first voxel on each ray that is not free: (its label, the distance at which the ray enters it); (free, inf) for a ray that meets none.

    labels: [X, Y, Z] integers;  origins: [n, 3] or [3];  directions: [n, 3] of length 1.  A ray may begin outside of the grid.
    Source of the walk: Amanatides and Woo 1987, all rays in step; float64.
    """
    n = len(directions)
    o, d = origins.double().expand(n, 3), directions.double()
    low, high = (torch.tensor(end, dtype=torch.float64) for end in (grid.low, grid.high))
    size = torch.tensor(grid.shape)
    inverse = 1 / torch.where(d == 0, torch.full_like(d, 1e-300), d)
    one, other = (low - o) * inverse, (high - o) * inverse
    enter = torch.minimum(one, other).amax(1).clamp(min=0)
    leave = torch.maximum(one, other).amin(1)
    cell = ((o + d * enter.unsqueeze(1) - low) / grid.voxel).floor().long().clamp(min=torch.zeros_like(size), max=size - 1)
    step = torch.where(d > 0, 1, torch.where(d < 0, -1, 0))
    edge = low + (cell + (step > 0)) * grid.voxel
    at = torch.where(step == 0, torch.inf, (edge - o) * inverse)
    stride = torch.where(step == 0, torch.inf, grid.voxel * inverse.abs())
    distance, found = enter.clone(), torch.full((n,), free)
    hit_at = torch.full((n,), torch.inf, dtype=torch.float64)
    alive = leave > enter
    for _ in range(sum(grid.shape) + 1):
        if not alive.any():
            break
        here = labels[cell[:, 0], cell[:, 1], cell[:, 2]].long()
        hit = alive & (here != free)
        found, hit_at = torch.where(hit, here, found), torch.where(hit, distance, hit_at)
        axis = at.argmin(1, keepdim=True)
        distance = torch.where(alive, at.gather(1, axis).squeeze(1), distance)
        at = at.scatter_add(1, axis, stride.gather(1, axis))
        cell = cell.scatter_add(1, axis, step.gather(1, axis))
        alive = alive & ~hit & ((cell >= 0) & (cell < size)).all(1)
        cell = cell.clamp(min=torch.zeros_like(size), max=size - 1)
    return found, hit_at


@dataclass
class RayIoU:
    """Sums over scenes; `scores` reads them.

    A ray counts where the truth is not free.  It is true where the class is equal and the depths differ by less than the threshold;
    IoU_c = TP / (truth_c + predicted_c - TP), averaged over classes that occur (in truth or prediction), then over thresholds.
    """

    grid: VoxelGrid
    free: int
    thresholds: tuple[float, ...] = THRESHOLDS
    truth: Tensor = field(init=False)
    predicted: Tensor = field(init=False)
    true: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.truth, self.predicted = torch.zeros(self.free, dtype=torch.long), torch.zeros(self.free, dtype=torch.long)
        self.true = torch.zeros(len(self.thresholds), self.free, dtype=torch.long)

    def add(self, predicted: Tensor, truth: Tensor, origins: Tensor, directions: Tensor) -> None:
        """One scene.  predicted, truth: [X, Y, Z] labels, `free` where nothing is;  origins: [m, 3], each with all directions [n, 3]"""
        for name, labels in (("predicted", predicted), ("true", truth)):
            if tuple(labels.shape) != self.grid.shape or int(labels.max()) > self.free:
                raise SpecError(
                    f"{name} occupancy is {tuple(labels.shape)} with labels to {int(labels.max())}; want {self.grid.shape} with labels to {self.free}"
                )
        for origin in origins.reshape(-1, 3):
            gt, gt_at = cast(truth, self.grid, origin, directions, self.free)
            counts = gt != self.free
            own, own_at = cast(predicted, self.grid, origin, directions[counts], self.free)
            gt, gt_at = gt[counts], gt_at[counts]
            self.truth += torch.bincount(gt, minlength=self.free)
            self.predicted += torch.bincount(own[own != self.free], minlength=self.free)
            for i, threshold in enumerate(self.thresholds):
                right = (own == gt) & ((own_at - gt_at).abs() < threshold)
                self.true[i] += torch.bincount(gt[right], minlength=self.free)

    def scores(self) -> dict[str, float]:
        """{"rayiou": mean, "rayiou_1": … for each threshold}; NaN where no ray counted."""
        union = self.truth + self.predicted - self.true
        occurs = (self.truth + self.predicted) > 0
        own = [float((t[occurs] / u[occurs]).mean()) if occurs.any() else math.nan for t, u in zip(self.true, union, strict=True)]
        named = {f"rayiou_{threshold:g}": value for threshold, value in zip(self.thresholds, own, strict=True)}
        return {"rayiou": sum(own) / len(own), **named}


def ray_iou(
    predicted: Tensor, truth: Tensor, grid: VoxelGrid, free: int, origins: Tensor, directions: Tensor, thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, float]:
    """`RayIoU` of one scene."""
    own = RayIoU(grid, free, tuple(thresholds))
    own.add(predicted, truth, origins, directions)
    return own.scores()
