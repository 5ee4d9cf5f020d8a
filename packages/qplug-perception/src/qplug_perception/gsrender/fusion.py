"""The volume of the frame before, for voxels that this frame does not see: variant b of ray compensation ([I], off unless asked for)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qplug_perception.gsrender.geometry import VoxelGrid, transform

HIDDEN = 0.5  # a voxel is not seen if every ray had ended before it with at least this chance


def warp_volume(volume: Tensor, grid: VoxelGrid, to_its_frame: Tensor) -> Tensor:
    """A volume of another frame at the places of this one's voxels, trilinear; 0 where it does not reach.

    volume: [B, K, X, Y, Z];  to_its_frame: [B, 4, 4] from this frame into the volume's
    """
    b = len(volume)
    points = transform(to_its_frame, grid.centres(volume).expand(b, -1, -1))
    low = torch.tensor(grid.low, dtype=volume.dtype, device=volume.device)
    size = torch.tensor(grid.shape, dtype=volume.dtype, device=volume.device)
    where = 2 * (points - low) / (grid.voxel * size) - 1  # -1 and 1 are the outer faces of the grid
    # grid_sample's last coordinate is its first axis: x, y, z of a volume [X, Y, Z] stand as z, y, x
    return F.grid_sample(volume, where.flip(-1).reshape(b, *grid.shape, 3), mode="bilinear", padding_mode="zeros", align_corners=False)


class VolumeFusion(nn.Module):
    """conv([now, before · unseen]), a 1 × 1 × 1 convolution over both volumes."""

    def __init__(self, width: int, grid: VoxelGrid) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv3d(2 * width, width, 1)

    def forward(self, now: Tensor, before: Tensor, now_to_before: Tensor, looked: Tensor) -> Tensor:
        """now, before: [B, K, X, Y, Z];  now_to_before: [B, 4, 4];  looked: [B, X, Y, Z], as `Lift` gives it"""
        unseen = (looked < HIDDEN).to(now.dtype).unsqueeze(1)
        return self.conv(torch.cat([now, warp_volume(before, self.grid, now_to_before) * unseen], 1))
