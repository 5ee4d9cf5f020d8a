"""Made-up sequences: a cuboid that moves before a LiDAR and a camera, with exact masks and boxes, a ground and clutter."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qplug_perception.gsrender.geometry import Camera, invert, looking
from qplug_perception.gsrender.scenes import Scene, trace
from qplug_perception.mvctrack.virtual_points import View

HEIGHT = 1.8  # of the LiDAR above the ground, metres
CAR = 3  # "car" among nuImages' ten classes in the detector's order: any of the ten would do here


@dataclass(frozen=True)
class Moment:
    """One frame.  points: [N, 4] in the LiDAR's frame;  views: of the cameras;  box: [7] of the cuboid, in the LiDAR's frame"""

    points: Tensor
    views: tuple[View, ...]
    box: Tensor


@dataclass(frozen=True)
class Sensors:
    """rings: LiDAR beams from `low` to `high` (radians);  step: between azimuths, radians;  size: (H, W) of the image;  noise: metres, of ranges"""

    rings: int = 12
    low: float = -0.22
    high: float = 0.06
    step: float = math.radians(0.7)
    size: tuple[int, int] = (90, 160)
    noise: float = 0.02

    def rays(self) -> Tensor:
        """Directions over the ±50° ahead.  [n, 3]"""
        pitch = torch.linspace(self.low, self.high, self.rings).unsqueeze(1)
        turn = torch.arange(-math.radians(50), math.radians(50), self.step)
        flat = torch.stack([pitch.cos() * turn.cos(), pitch.cos() * turn.sin(), pitch.sin().expand(-1, len(turn))], -1)
        return flat.reshape(-1, 3)

    def intrinsics(self) -> Tensor:
        h, w = self.size
        focal = w / 2 / math.tan(math.radians(50))
        return torch.tensor([[focal, 0.0, w / 2], [0.0, focal, h / 2], [0.0, 0.0, 1.0]])


def made_sequence(seed: int, frames: int = 8, sensors: Sensors = Sensors(), distance: tuple[float, float] = (8.0, 22.0)) -> list[Moment]:
    """A car that drives straight among three boxes that stand still."""
    g = torch.Generator().manual_seed(seed)
    draw = torch.rand(24, generator=g)
    far = distance[0] + (distance[1] - distance[0]) * draw[0]
    angle = (draw[1] - 0.5) * 0.8
    yaw = 2 * math.pi * draw[2]
    speed = 0.15 + 0.5 * draw[3]
    size = torch.tensor([4.2, 1.8, 1.6]) * (0.9 + 0.2 * draw[4:7])
    start = torch.stack([far * angle.cos(), far * angle.sin(), size[2] / 2])
    beside = draw[7:16].reshape(3, 3)
    away = torch.stack([far * (0.8 + 0.6 * beside[:, 0]), (beside[:, 1] - 0.5) * 16, torch.ones(3)], 1)
    gap = (away[:, :2] - start[:2]).norm(dim=1, keepdim=True)
    away[:, :2] += torch.where(gap < 5, (away[:, :2] - start[:2]) / gap.clamp(min=0.1) * (5 - gap), 0.0)
    velocity = torch.zeros(4, 3)
    velocity[0, :2] = speed * torch.stack([yaw.cos(), yaw.sin()])
    scene = Scene(
        torch.cat([start.unsqueeze(0), away]),
        torch.cat([size.unsqueeze(0), torch.tensor([[1.2, 1.2, 2.0]]).expand(3, 3)]),
        torch.cat([yaw.reshape(1), 6 * draw[20:23]]),
        torch.zeros(4, dtype=torch.long),
        velocity,
        torch.ones(4, 3),
        0.0,
        seed,
    )
    return [moment(scene, float(t), sensors, g) for t in range(frames)]


def moment(scene: Scene, time: float, sensors: Sensors, generator: torch.Generator) -> Moment:
    """What the sensors see of a scene; box 0 is the object, masks are exact."""
    origin = torch.tensor([0.0, 0.0, HEIGHT])
    rays = sensors.rays()
    at, _, _ = trace(scene, origin, rays, time)
    met = torch.isfinite(at) & (at < 60)
    ranges = at[met] + sensors.noise * torch.randn(int(met.sum()), generator=generator)
    xyz = rays[met] * ranges.unsqueeze(1)
    points = torch.cat([xyz, torch.full((len(xyz), 1), 0.5)], 1)
    k, pose = sensors.intrinsics(), looking(0.0, (0.2, 0.1, -0.2))  # camera_to_lidar
    pixels = Camera(k, torch.eye(4), sensors.size).pixels()
    look = torch.cat([pixels, torch.ones(len(pixels), 1)], 1) @ torch.linalg.inv(k).T
    depth, which, _ = trace(scene, pose[:3, 3] + origin, look @ pose[:3, :3].T, time)
    mask = ((which == 0) & torch.isfinite(depth)).reshape(1, *sensors.size)
    some = bool(mask.any())
    view = View(k, invert(pose), mask if some else mask[:0], torch.full((int(some),), CAR), torch.full((int(some),), 0.9))
    centre = scene.centre[0] + time * scene.velocity[0] - origin
    length, width, height = scene.size[0]
    return Moment(points, (view,), torch.cat([centre, torch.stack([width, length, height, scene.yaw[0]])]))
