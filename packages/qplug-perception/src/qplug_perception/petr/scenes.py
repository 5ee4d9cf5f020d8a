"""A made-up world of coloured blobs before six cameras: what small detectors are trained, calibrated and judged on, by seed.

A scene is a flat ground with two to four boxes of three kinds around the rig.  Each camera sees a box as an ellipse that fills the rectangle
around its eight corners, in its kind's colour, nearer ones before farther ones, on a noisy ground and sky.  So where a box stands follows from
where its blob is and how large.  Its orientation hardly shows: headings differ by 17° at most, velocities are zero, and scores go by centres.

Scenes of training have seeds below 10⁹ and those of evaluation from there on, so that none is both.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

CAMERAS = 6
EVALUATION = 1_000_000_000  # the first seed that no model was trained or calibrated on
KINDS = ("car", "pedestrian", "truck")
_SIZES = torch.tensor([[1.8, 4.2, 1.6], [0.9, 0.9, 1.8], [2.5, 6.5, 3.0]])  # w, l, h in metres
_COLOURS = torch.tensor([[40.0, 60.0, 220.0], [60.0, 210.0, 60.0], [220.0, 110.0, 40.0]])  # blue, green, red: the order of the images
GROUND = -1.6  # metres below the LiDAR
NEAREST, FARTHEST = 4.0, 13.0


@dataclass(frozen=True)
class Scene:
    """images: uint8 [6, 3, H, W];  lidar2img: [6, 4, 4];  boxes: [n, 9];  labels: [n]"""

    images: Tensor
    lidar2img: Tensor
    boxes: Tensor
    labels: Tensor


def rig(height: int, width: int, opening: float = 72.0) -> Tensor:
    """lidar2img of six cameras, 60° apart, on a ring of 0.3 m.  [6, 4, 4]

    opening: horizontal field of view in degrees
    """
    focal = width / 2 / math.tan(math.radians(opening) / 2)
    projection = torch.eye(4, dtype=torch.float64)
    projection[:3, :3] = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    out = []
    for i in range(CAMERAS):
        yaw = i * 2 * math.pi / CAMERAS
        forward = torch.tensor([math.cos(yaw), math.sin(yaw), 0.0], dtype=torch.float64)
        right = torch.tensor([math.sin(yaw), -math.cos(yaw), 0.0], dtype=torch.float64)
        turned = torch.stack([right, torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64), forward])
        outside = torch.eye(4, dtype=torch.float64)
        outside[:3, :3], outside[:3, 3] = turned, -turned @ (0.3 * forward)
        out.append(projection @ outside)
    return torch.stack(out).float()


def make_scene(seed: int, height: int = 64, width: int = 112) -> Scene:
    """The scene of a seed, the same each time."""
    chance = torch.Generator().manual_seed(seed)
    boxes, labels = _boxes(chance)
    lidar2img = rig(height, width)
    return Scene(_render(boxes, labels, lidar2img, height, width, chance), lidar2img, boxes, labels)


def make_scenes(seeds: Iterable[int], height: int = 64, width: int = 112) -> list[Scene]:
    """One scene a seed."""
    return [make_scene(seed, height, width) for seed in seeds]


def _boxes(chance: torch.Generator) -> tuple[Tensor, Tensor]:
    count = int(torch.randint(2, 5, (), generator=chance))
    places: list[Tensor] = []
    while len(places) < count:
        r, angle = torch.rand(2, generator=chance) * torch.tensor([FARTHEST - NEAREST, 2 * math.pi]) + torch.tensor([NEAREST, 0.0])
        place = torch.stack([r * angle.cos(), r * angle.sin()])
        if all(float((place - other).norm()) > 4.0 for other in places):
            places.append(place)
    labels = torch.randint(len(KINDS), (count,), generator=chance)
    size = _SIZES[labels] * (0.9 + 0.2 * torch.rand(count, 3, generator=chance))
    yaw = 0.6 * torch.rand(count, 1, generator=chance) - 0.3
    z = GROUND + size[:, 2:] / 2
    return torch.cat([torch.stack(places), z, size, yaw, torch.zeros(count, 2)], 1), labels


def corners(boxes: Tensor) -> Tensor:
    """[n, 9] → the eight corners of each, [n, 8, 3]; at yaw 0 the length lies along -y, and yaw turns it clockwise, seen from above."""
    signs = torch.tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    local = signs * boxes[:, None, 3:6]  # w along x, l along y, h along z
    c, s = boxes[:, 6, None].cos(), -boxes[:, 6, None].sin()
    x, y = local[..., 0] * c - local[..., 1] * s, local[..., 0] * s + local[..., 1] * c
    return torch.stack([x, y, local[..., 2]], -1) + boxes[:, None, :3]


def _render(boxes: Tensor, labels: Tensor, lidar2img: Tensor, height: int, width: int, chance: torch.Generator) -> Tensor:
    v, u = torch.arange(height).float()[:, None] + 0.5, torch.arange(width).float()[None, :] + 0.5
    ground = (v > height / 2).float().expand(height, width)
    back = torch.stack([150 - 60 * ground, 140 - 40 * ground, 120 - 30 * ground])  # sky above, earth below
    images = back + 12 * torch.randn(len(lidar2img), 3, height, width, generator=chance)
    points = torch.cat([corners(boxes), torch.ones(len(boxes), 8, 1)], -1)
    for camera, matrix in enumerate(lidar2img):
        seen = points @ matrix.T  # [n, 8, 4]
        depth = seen[..., 2]
        for i in depth.mean(1).argsort(descending=True).tolist():
            if float(depth[i].min()) < 0.5:
                continue  # beside or behind the camera
            at = seen[i, :, :2] / depth[i, :, None]
            low, high = at.amin(0), at.amax(0)
            if float(high[0]) < 0 or float(low[0]) > width:
                continue
            centre, half = (low + high) / 2, ((high - low) / 2).clamp(min=0.5)
            inside = ((u - centre[0]) / half[0]) ** 2 + ((v - centre[1]) / half[1]) ** 2
            cover = ((1.2 - inside) / 0.4).clamp(0, 1)
            images[camera] = images[camera] * (1 - cover) + _COLOURS[labels[i]][:, None, None] * cover
    return images.clamp(0, 255).to(torch.uint8)
