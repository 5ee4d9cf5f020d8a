"""Made-up streets: a ground, boxes of Occ3D's classes, several cameras around a vehicle that moves, and exact labels.

Nothing here is nuScenes: it is what the geometry, the losses and the quantization are tried on where no data set can be had.  Images are coloured by
class with shading and noise; depth and classes come from the same ray casting; voxels are those whose volume a box fills to a quarter.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qplug_perception.gsrender.geometry import FREE, Camera, VoxelGrid, invert, looking, yaw_pose
from qplug_perception.gsrender.losses import IGNORED

# (class, length, width, height, how fast it may go), of things that stand on the ground
_KINDS = (
    (4, 4.2, 1.8, 1.6, 2.0),  # car
    (10, 6.0, 2.2, 2.4, 1.5),  # truck
    (7, 0.9, 0.9, 1.7, 1.0),  # pedestrian
    (15, 5.0, 1.2, 2.8, 0.0),  # manmade
    (16, 1.6, 1.6, 2.2, 0.0),  # vegetation
)
GROUND = 11  # driveable surface
_CLASSES = 17
SMALL_GRID = VoxelGrid((-8.0, -8.0, -1.0), 0.8, (20, 20, 4))
_SKY = (0.55, 0.75, 0.95)


@dataclass(frozen=True)
class Rig:
    """Cameras around a vehicle.

    size: (H, W) of an image;  yaws: where each looks, radians from straight ahead;  width: horizontal field of view, radians;  height: metres
    """

    size: tuple[int, int] = (32, 48)
    yaws: tuple[float, ...] = (0.0, math.pi / 2, math.pi, -math.pi / 2)
    width: float = math.radians(100)
    height: float = 1.6

    def intrinsics(self) -> Tensor:
        """[n, 3, 3]"""
        h, w = self.size
        focal = w / 2 / math.tan(self.width / 2)
        return torch.tensor([[focal, 0.0, w / 2], [0.0, focal, h / 2], [0.0, 0.0, 1.0]]).expand(len(self.yaws), 3, 3).contiguous()

    def to_vehicle(self) -> Tensor:
        """camera_to_vehicle.  [n, 4, 4]"""
        return torch.stack([looking(yaw, (0.5 * math.cos(yaw), 0.5 * math.sin(yaw), self.height), pitch=-0.1) for yaw in self.yaws])


@dataclass(frozen=True)
class Scene:
    """Boxes on a ground at z = 0, in the world's frame at time 0; the vehicle starts at the origin.

    centre, size: [M, 3];  yaw: [M];  label: [M];  velocity: [M, 3];  colour: [M, 3];  pace: metres that the vehicle goes ahead in a frame
    """

    centre: Tensor
    size: Tensor
    yaw: Tensor
    label: Tensor
    velocity: Tensor
    colour: Tensor
    pace: float
    seed: int

    def pose(self, time: float) -> Tensor:
        """vehicle_to_world at a time, in frames.  [4, 4]"""
        return yaw_pose(0.03 * time, (self.pace * time, 0.0, 0.0))

    def boxes_to_world(self, time: float) -> Tensor:
        """[M, 4, 4]"""
        places = (self.centre + time * self.velocity).tolist()
        return torch.stack([yaw_pose(float(yaw), (x, y, z)) for yaw, (x, y, z) in zip(self.yaw, places, strict=True)])


def random_scene(seed: int, boxes: int = 10, extent: float = 10.0) -> Scene:
    """A street by chance; nothing stands within 2.2 m of where the vehicle starts."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, len(_KINDS), (boxes,), generator=g)
    angle, far = 2 * math.pi * torch.rand(boxes, generator=g), 3.2 + (extent - 3.2) * torch.rand(boxes, generator=g)
    jitter = 0.85 + 0.3 * torch.rand(boxes, 3, generator=g)
    size = torch.tensor([kind[1:4] for kind in _KINDS])[kinds] * jitter
    centre = torch.stack([far * angle.cos(), far * angle.sin(), size[:, 2] / 2], -1)
    yaw = 2 * math.pi * torch.rand(boxes, generator=g)
    speed = torch.tensor([kind[4] for kind in _KINDS])[kinds] * torch.rand(boxes, generator=g)
    velocity = torch.stack([speed * yaw.cos(), speed * yaw.sin(), torch.zeros(boxes)], -1)
    label = torch.tensor([kind[0] for kind in _KINDS])[kinds]
    colour = palette()[label] * (0.8 + 0.4 * torch.rand(boxes, 3, generator=g))
    pace = 0.4 + 0.8 * float(torch.rand((), generator=g))
    return Scene(centre, size, yaw, label, velocity, colour, pace, seed)


def palette() -> Tensor:
    """A colour for each class.  [17, 3]"""
    hue = torch.arange(_CLASSES) * 0.61803398875 % 1
    return torch.stack([(hue * 6 + shift).remainder(6).sub(3).abs().sub(1).clamp(0, 1) for shift in (0, 4, 2)], -1) * 0.7 + 0.15


def trace(scene: Scene, origin: Tensor, directions: Tensor, time: float) -> tuple[Tensor, Tensor, Tensor]:
    """What rays of the world meet first: (distance in units of the direction, inf for the sky; index of the box, M for the ground; axis of the face).

    origin: [3];  directions: [n, 3]
    """
    inward = invert(scene.boxes_to_world(time))  # [M, 4, 4]
    o = (inward[:, :3, :3] @ origin + inward[:, :3, 3]).unsqueeze(1)  # [M, 1, 3]
    d = directions @ inward[:, :3, :3].transpose(1, 2)  # [M, n, 3]
    d = torch.where(d.abs() < 1e-9, 1e-9, d)
    half = scene.size.unsqueeze(1) / 2
    one, other = (-half - o) / d, (half - o) / d
    enter, axis = torch.minimum(one, other).max(-1)
    leave = torch.maximum(one, other).amin(-1)
    at = torch.where((enter < leave) & (enter > 0), enter, torch.inf)  # [M, n]
    down = directions[:, 2]
    ground = torch.where(down < -1e-6, -origin[2] / torch.where(down < -1e-6, down, -1.0), torch.inf)
    at, axis = torch.cat([at, ground.unsqueeze(0)]), torch.cat([axis, torch.full_like(axis[:1], 2)])
    distance, which = at.min(0)
    return distance, which, axis.gather(0, which.unsqueeze(0)).squeeze(0)


@dataclass(frozen=True)
class Frame:
    """One moment of a scene, as a data set would give it.

    images: [n, 3, H, W] in [0, 1];  intrinsics: [n, 3, 3];  to_vehicle: [n, 4, 4];  pose: [4, 4] vehicle_to_world
    depth: [n, H·W] metres along each camera's axis, 0 = none;  labels: [n, H·W] classes, IGNORED in the sky
    """

    images: Tensor
    intrinsics: Tensor
    to_vehicle: Tensor
    pose: Tensor
    depth: Tensor
    labels: Tensor

    def cameras(self) -> list[Camera]:
        """For points in the vehicle's frame at this moment."""
        size = (self.images.shape[2], self.images.shape[3])
        return [Camera(k, invert(e), size) for k, e in zip(self.intrinsics, self.to_vehicle, strict=True)]


def frame(scene: Scene, time: float = 0.0, rig: Rig = Rig(), noise: float = 0.04, farthest: float = 52.0) -> Frame:
    """What the rig sees.  noise: deviation of the pixels, from the scene's own seed"""
    g = torch.Generator().manual_seed(scene.seed * 1009 + round(time * 7) + 31)
    intrinsics, to_vehicle, pose = rig.intrinsics(), rig.to_vehicle(), scene.pose(time)
    classes = torch.cat([scene.label, torch.tensor([GROUND])])
    colours = torch.cat([scene.colour, torch.tensor([[0.35, 0.35, 0.37]])])
    shade = torch.tensor([0.75, 0.9, 1.05])
    images, depths, labels = [], [], []
    for k, extrinsic in zip(intrinsics, to_vehicle, strict=True):
        camera = Camera(k, torch.eye(4), rig.size)
        uv1 = torch.cat([camera.pixels(), torch.ones(rig.size[0] * rig.size[1], 1)], -1)
        rays = uv1 @ torch.linalg.inv(k).T  # z = 1: the distance along the ray is the depth
        to_world = pose @ extrinsic
        depth, which, axis = trace(scene, to_world[:3, 3], rays @ to_world[:3, :3].T, time)
        sky = ~torch.isfinite(depth) | (depth > farthest)
        colour = torch.where(sky.unsqueeze(1), torch.tensor(_SKY), colours[which] * shade[axis].unsqueeze(1))
        colour = (colour + noise * torch.randn(colour.shape, generator=g)).clamp(0, 1)
        images.append(colour.T.reshape(3, *rig.size))
        depths.append(torch.where(sky, 0.0, depth))
        labels.append(torch.where(sky, IGNORED, classes[which]))
    return Frame(torch.stack(images), intrinsics, to_vehicle, pose, torch.stack(depths), torch.stack(labels))


def occupancy(scene: Scene, grid: VoxelGrid = SMALL_GRID, time: float = 0.0, samples: int = 4, share: float = 0.25) -> Tensor:
    """The true voxels in the vehicle's frame: a box's class where it fills `share` of the volume, the ground where z = 0 lies inside.  [X, Y, Z]"""
    to_world = scene.pose(time)
    inward = invert(scene.boxes_to_world(time)) @ to_world
    steps = (torch.arange(samples) + 0.5) / samples - 0.5
    inner = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3) * grid.voxel
    points = (grid.centres().unsqueeze(1) + inner).reshape(-1, 3)
    labels = torch.full((grid.count,), FREE)
    centres = grid.centres()
    labels[(centres[:, 2] - grid.voxel / 2 <= 0) & (centres[:, 2] + grid.voxel / 2 > 0)] = GROUND
    best = torch.full((grid.count,), share)
    for inverse, size, label in zip(inward, scene.size, scene.label, strict=True):
        local = points @ inverse[:3, :3].T + inverse[:3, 3]
        filled = (local.abs() <= size / 2).all(-1).reshape(grid.count, -1).float().mean(1)
        labels = torch.where(filled >= best, label, labels)
        best = torch.maximum(best, filled)
    return labels.reshape(grid.shape)


def sparse(values: Frame, share: float, seed: int) -> Frame:
    """The same with labels at a random share of the pixels alone, as projected LiDAR has them."""
    kept = torch.rand(values.depth.shape, generator=torch.Generator().manual_seed(seed)) < share
    return Frame(
        values.images,
        values.intrinsics,
        values.to_vehicle,
        values.pose,
        torch.where(kept, values.depth, 0.0),
        torch.where(kept, values.labels, IGNORED),
    )
