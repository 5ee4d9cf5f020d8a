"""From points to what the tracker reads: a crop around the box of the frame before, as voxels of mean coordinates.

Both frames are moved into that box's frame.  Voxels are a dense grid with a mask, not a list of occupied ones: there is no sparse convolution in
plain torch.  What is computed is the same, empty voxels are only not passed over, which costs time.
"""

from dataclasses import dataclass

import torch
from qcore.errors import SpecError
from torch import Tensor

from qplug_perception.mvctrack.boxes import to_box_frame


@dataclass(frozen=True)
class CropGrid:
    """half: (x, y, z) metres to each side of the box's centre;  voxel: (x, y, z) sides;  the last voxel of an axis may reach beyond"""

    half: tuple[float, float, float]
    voxel: tuple[float, float, float]

    def __post_init__(self) -> None:
        if min(self.half) <= 0 or min(self.voxel) <= 0:
            raise SpecError(f"a crop has positive sides, got {self.half} and {self.voxel}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X), as convolutions have their axes."""
        x, y, z = (max(1, round(2 * h / v + 0.49)) for h, v in zip(self.half, self.voxel, strict=True))
        return z, y, x


# the release's crops; large: bus, truck and trailer
CAR = CropGrid((4.8, 4.8, 1.5), (0.075, 0.075, 0.15))
PEDESTRIAN = CropGrid((1.92, 1.92, 1.5), (0.03, 0.03, 0.15))
LARGE = CropGrid((9.6, 9.6, 3.0), (0.15, 0.15, 0.3))


def crop(points: Tensor, box: Tensor, grid: CropGrid) -> Tensor:
    """The points [N, ≥3] around a box, in its frame; one point at 0 where there is none, as the release has it.  [n ≥ 1, same width]"""
    own = torch.cat([to_box_frame(points[:, :3], box), points[:, 3:]], 1)
    half = torch.tensor(grid.half, dtype=own.dtype)
    own = own[(own[:, :3].abs() < half).all(1)]
    return own if len(own) else points.new_zeros(1, points.shape[1])


def voxelize(points: Tensor, grid: CropGrid) -> tuple[Tensor, Tensor]:
    """(mean of the points' features in each voxel [C, Z, Y, X], whether there is one [1, Z, Y, X]); every point counts, none is dropped.

    points: [n, C] in the crop's frame, x, y, z first
    """
    half, voxel = torch.tensor(grid.half, dtype=points.dtype), torch.tensor(grid.voxel, dtype=points.dtype)
    z, y, x = grid.shape
    cell = ((points[:, :3] + half) / voxel).floor().long().clamp(min=torch.zeros(3, dtype=torch.long), max=torch.tensor([x, y, z]) - 1)
    flat = (cell[:, 2] * y + cell[:, 1]) * x + cell[:, 0]
    count = torch.zeros(z * y * x, dtype=points.dtype).index_add(0, flat, torch.ones(len(points), dtype=points.dtype))
    total = torch.zeros(z * y * x, points.shape[1], dtype=points.dtype).index_add(0, flat, points)
    mean = total / count.clamp(min=1).unsqueeze(1)
    return mean.T.reshape(-1, z, y, x), (count > 0).to(points.dtype).reshape(1, z, y, x)
