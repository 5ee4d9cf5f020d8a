"""Where things are: a grid of voxels, cameras, rigid motions.

Lengths are metres.  A pose is a 4 × 4 matrix that takes points of its own frame into another, named `<own>_to_<other>`; a camera looks along +z,
x to the right, y down.  The image spans [0, W] × [0, H]: the centre of pixel (row i, column j) is (j + ½, i + ½).
"""

from dataclasses import dataclass

import torch
from qcore.errors import SpecError
from torch import Tensor


@dataclass(frozen=True)
class VoxelGrid:
    """Cubes of side `voxel`, the first with its lower corner at `low`.

    low: (x, y, z) of the lower corner;  shape: (X, Y, Z) how many
    """

    low: tuple[float, float, float]
    voxel: float
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.voxel <= 0 or min(self.shape) < 1:
            raise SpecError(f"a grid has voxels of positive size, at least one on each axis, got {self.voxel} and {self.shape}")

    @property
    def high(self) -> tuple[float, float, float]:
        x, y, z = (low + self.voxel * n for low, n in zip(self.low, self.shape, strict=True))
        return x, y, z

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def centres(self, like: Tensor | None = None) -> Tensor:
        """Centre of each voxel, z fastest.  [X·Y·Z, 3], of the dtype and device of `like`"""
        own = torch.empty(0) if like is None else like
        axes = [low + self.voxel * (torch.arange(n, dtype=own.dtype, device=own.device) + 0.5) for low, n in zip(self.low, self.shape, strict=True)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)

    def index(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(flat index, whether inside) of points [..., 3]; the index of one outside is 0."""
        low = torch.tensor(self.low, dtype=points.dtype, device=points.device)
        size = torch.tensor(self.shape, device=points.device)
        cell = ((points - low) / self.voxel).floor().long()
        inside = ((cell >= 0) & (cell < size)).all(-1)
        flat = (cell[..., 0] * self.shape[1] + cell[..., 1]) * self.shape[2] + cell[..., 2]
        return torch.where(inside, flat, 0), inside


# Occ3D-nuScenes, as RenderOcc's configuration has it: [-40, 40] × [-40, 40] × [-1, 5.4]
OCC3D = VoxelGrid((-40.0, -40.0, -1.0), 0.4, (200, 200, 16))
# classes of Occ3D-nuScenes: 17 of them, 0 = others … 16 = vegetation; the label 17 means free
CLASSES = 17
FREE = 17


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    intrinsics: [3, 3], pixels;  world_to_camera: [4, 4];  size: (H, W)
    "world" is the frame in which the Gaussians are given, usually the vehicle's at time t.
    """

    intrinsics: Tensor
    world_to_camera: Tensor
    size: tuple[int, int]

    def pixels(self) -> Tensor:
        """(u, v) of every pixel's centre, row by row.  [H·W, 2]"""
        own = self.intrinsics
        v, u = (torch.arange(n, dtype=own.dtype, device=own.device) + 0.5 for n in self.size)
        return torch.stack(torch.meshgrid(v, u, indexing="ij"), -1).flip(-1).reshape(-1, 2)

    def moved(self, world_to_other: Tensor) -> "Camera":
        """The same camera for points given in another frame, from which `world_to_other` leads into this camera's world."""
        return Camera(self.intrinsics, self.world_to_camera @ world_to_other, self.size)


def invert(pose: Tensor) -> Tensor:
    """The inverse of rigid motions [..., 4, 4], by transposing the rotation."""
    r = pose[..., :3, :3].transpose(-1, -2)
    out = torch.zeros_like(pose)
    out[..., :3, :3] = r
    out[..., :3, 3] = -(r @ pose[..., :3, 3:]).squeeze(-1)
    out[..., 3, 3] = 1
    return out


def transform(pose: Tensor, points: Tensor) -> Tensor:
    """Points [..., n, 3] by poses [..., 4, 4]."""
    return points @ pose[..., :3, :3].transpose(-1, -2) + pose[..., None, :3, 3]


def yaw_pose(yaw: float, translation: tuple[float, float, float]) -> Tensor:
    """A turn about z, then a shift.  [4, 4] float32"""
    angle = torch.tensor(yaw, dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    pose[:3, 3] = torch.tensor(translation, dtype=torch.float64)
    return pose.float()


def looking(yaw: float, position: tuple[float, float, float], pitch: float = 0.0) -> Tensor:
    """camera_to_vehicle of a camera that looks along the vehicle's x turned by `yaw`, tilted up by `pitch` (radians).  [4, 4] float32

    Vehicle frame: x forward, y left, z up.
    """
    c, s = torch.tensor(pitch, dtype=torch.float64).cos(), torch.tensor(pitch, dtype=torch.float64).sin()
    # columns: the camera's right, down and forward in a vehicle frame that looks along x
    tilted = torch.tensor([[0.0, float(s), float(c)], [-1.0, 0.0, 0.0], [0.0, -float(c), float(s)]])
    pose = yaw_pose(yaw, position)
    out = pose.clone()
    out[:3, :3] = pose[:3, :3] @ tilted
    return out
