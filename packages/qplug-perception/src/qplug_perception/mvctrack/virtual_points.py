"""MVCP: virtual points from cameras (the paper's section III-B, after MVP, https://arxiv.org/abs/2111.06881).

Pixels of each instance mask are drawn, take the depth of the nearest LiDAR point of the same instance, and are carried back into the LiDAR's frame:

    1. LiDAR points are projected into each camera; a point whose pixel lies in a mask is foreground of the first such mask
    2. K pixels of each mask are drawn without replacement; a mask of fewer pixels repeats the first one drawn
    3. a drawn pixel takes the depth of the foreground point of its own instance that is nearest on the image
    4. (u·d, v·d, d) goes through K⁻¹ and the inverse extrinsics

Where paper and release differ:

- *Density.*  In the release scale = max(1, max(sigmoid(·) + 1, 2)) is 2 whatever it is given, so K is min(120, 120) = 120 for every object, and what
  it is given is the norm of (u, v, depth) in pixels, no distance.  Here K = clip(K₀ · (d / d_mean)^growth, low, high) with d in metres ([I]; the
  paper gives no formula); `MVCPSettings(fixed=120)` is the release.
- *Features.*  The release appends class, score and flag, and then drops them: its network reads rows 0 to 2.  `features=3` is that, 15 keeps them.
- *Missing data.*  The release writes to LIDAR_TOP_VIRTUAL, makes the folder LIDAR_TOP_VIRTUAL_3, and goes on with raw points where a file is
  missing.  Here nothing is passed over: `Counters` says what was left out and why, and `nuscenes.read_virtual` raises.
- *Classes.*  A detector of more than ten classes ends the release with an index out of bounds; here with an error that says so.
- *Pixels.*  A virtual point lies on the ray through its pixel's centre, not through its corner, so it falls back into its own pixel.

Known failure: pixels at a mask's edge, and LiDAR points that shine past it, mix foreground with background; `erosion` takes pixels off the edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from qcore.errors import SpecError
from torch import Tensor

CLASSES = 10  # of nuImages, in the detector's order
FEATURES = (3, 15)
REAL_FLAG, VIRTUAL_FLAG = 0.0, -1.0


@dataclass(frozen=True)
class View:
    """A camera and the instances that a detector found in its image.

    intrinsics: [3, 3];  lidar_to_camera: [4, 4];  masks: [m, H, W] bool;  classes: [m] of nuImages' ten;  scores: [m]
    """

    intrinsics: Tensor
    lidar_to_camera: Tensor
    masks: Tensor
    classes: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        m = len(self.masks)
        if self.masks.ndim != 3 or self.masks.dtype is not torch.bool or self.classes.shape != (m,) or self.scores.shape != (m,):
            raise SpecError(
                f"a view has masks [m, H, W] of bool with a class and a score each, got {tuple(self.masks.shape)} of {self.masks.dtype}, "
                f"{tuple(self.classes.shape)} and {tuple(self.scores.shape)}"
            )
        if m and (int(self.classes.min()) < 0 or int(self.classes.max()) >= CLASSES):
            bad = next(int(c) for c in self.classes if not 0 <= c < CLASSES)
            raise SpecError(f"a mask has class {bad}, but nuImages has {CLASSES}; map the detector's classes to them, or leave the instance out")


@dataclass(frozen=True)
class MVCPSettings:
    """How virtual points are made.

    fixed:    K for every instance, as the release (120); None = by distance
    base, growth, low, high: K = clip(base · (d / d_mean)^growth, low, high), d: median distance of an instance's LiDAR points, metres [I]
    erosion:  pixels that are taken off the edge of each mask
    farthest: a nearest point this many pixels away, or more, gives no depth (the release's 3000 rejects next to nothing)
    """

    fixed: int | None = None
    base: int = 80
    growth: float = 1.0
    low: int = 50
    high: int = 240
    erosion: int = 0
    farthest: float = 3000.0

    def __post_init__(self) -> None:
        if (self.fixed is not None and self.fixed < 1) or not 1 <= self.low <= self.high or self.base < 1:
            raise SpecError(f"numbers of pixels are positive with low <= high, got fixed={self.fixed}, base={self.base}, {self.low} … {self.high}")
        if self.growth < 0 or self.erosion < 0 or self.farthest <= 0:
            raise SpecError(f"growth and erosion are 0 or more, farthest positive, got {self.growth}, {self.erosion}, {self.farthest}")

    def count(self, distance: float, mean: float) -> int:
        """K of an instance at a distance, where the frame's instances are `mean` away."""
        if self.fixed is not None:
            return self.fixed
        return int(min(max(round(self.base * (distance / mean) ** self.growth), self.low), self.high))


@dataclass
class Counters:
    """What became of the instances, so that nothing is left out in silence.

    instances: seen;  densified: gave virtual points;  without_points: no LiDAR point lies in the mask;  eroded_away: erosion left no pixel
    padded: fewer pixels than K, the first was repeated;  too_far: pixels without a near enough point;  twice: points that two cameras see in masks
    """

    instances: int = 0
    densified: int = 0
    without_points: int = 0
    eroded_away: int = 0
    padded: int = 0
    too_far: int = 0
    twice: int = 0

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class VirtualPoints:
    """What MVCP adds to a frame.

    xyz: [M, 3] in the LiDAR's frame;  classes, scores: [M];  instance: [M] number over all views, in order;  source: [M] index of the LiDAR point
    whose depth it has;  pixel: [M, 2] column and row;  camera: [M]
    foreground: [F] indices of real points inside masks, each once;  foreground_classes, foreground_scores: [F]
    """

    xyz: Tensor
    classes: Tensor
    scores: Tensor
    instance: Tensor
    source: Tensor
    pixel: Tensor
    camera: Tensor
    foreground: Tensor
    foreground_classes: Tensor
    foreground_scores: Tensor
    counters: Counters = field(default_factory=Counters)

    def __len__(self) -> int:
        return len(self.xyz)


def project(points: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
    """(pixel [n, 2] column and row, depth [n], index [n]) of the points inside the image: depth > 0, 0 < u < W, 0 < v < H, floored.  float64"""
    pose = view.lidar_to_camera.double()
    at = points[:, :3].double() @ pose[:3, :3].T + pose[:3, 3]
    image = at @ view.intrinsics.double().T
    depth = at[:, 2]
    uv = image[:, :2] / torch.where(depth > 0, depth, 1.0).unsqueeze(1)
    height, width = view.masks.shape[1:]
    inside = (depth > 0) & (uv > 0).all(1) & (uv[:, 0] < width) & (uv[:, 1] < height)
    index = inside.nonzero().squeeze(-1)
    return uv[index].floor().long(), depth[index], index


def unproject(pixel: Tensor, depth: Tensor, view: View) -> Tensor:
    """Points of the LiDAR's frame on the rays through pixels' centres.  pixel: [n, 2] column and row, depth: [n] → [n, 3] float64"""
    uv1 = torch.cat([pixel.double() + 0.5, torch.ones(len(pixel), 1, dtype=torch.float64)], 1) * depth.double().unsqueeze(1)
    pose = view.lidar_to_camera.double()
    return (uv1 @ torch.linalg.inv(view.intrinsics.double()).T - pose[:3, 3]) @ pose[:3, :3]


def eroded(masks: Tensor, pixels: int) -> Tensor:
    """Masks [m, H, W] without the pixels that lie within `pixels` of their edge; the image's border is no edge."""
    if not pixels or not len(masks):
        return masks
    outside = (~masks).float().unsqueeze(1)
    return F.max_pool2d(outside, 2 * pixels + 1, 1, pixels).squeeze(1) == 0


def virtual_points(
    points: Tensor, views: Sequence[View], settings: MVCPSettings = MVCPSettings(), *, generator: torch.Generator | None = None
) -> VirtualPoints:
    """Virtual points of one frame.

    points:    [N, 3 or more] of the LiDAR, its frame
    generator: draws the pixels; None = one with seed 0, so that a frame gives the same points each time
    """
    if points.ndim != 2 or points.shape[1] < 3:
        raise SpecError(f"LiDAR points are [N, 3] or wider, got {tuple(points.shape)}")
    g = torch.Generator().manual_seed(0) if generator is None else generator
    counters = Counters(instances=sum(len(v.masks) for v in views))
    found: list[tuple[int, int, int, Tensor, Tensor, Tensor, Tensor]] = []
    owner = torch.full((len(points),), -1)
    number = 0
    for camera, view in enumerate(views):
        masks = eroded(view.masks, settings.erosion)
        pixel, depth, index = project(points, view)
        for m, mask in enumerate(masks):
            number += 1
            if view.masks[m].any() and not mask.any():
                counters.eroded_away += 1
                continue
            # the first mask that a point lies in takes it
            earlier = masks[:m, pixel[:, 1], pixel[:, 0]].any(0)
            mine = mask[pixel[:, 1], pixel[:, 0]] & ~earlier
            if not mine.any():
                counters.without_points += 1
                continue
            found.append((number - 1, camera, m, mask, pixel[mine], depth[mine], index[mine]))
            counters.twice += int((owner[index[mine]] >= 0).sum())
            first = index[mine][owner[index[mine]] < 0]
            owner[first] = number - 1
    distances = [float(points[index, :3].double().norm(dim=1).median()) for *_, index in found]
    mean = sum(distances) / len(distances) if distances else 1.0
    columns: list[tuple[Tensor, ...]] = []
    for (instance, camera, m, mask, pixel, depth, index), distance in zip(found, distances, strict=True):
        view, k = views[camera], settings.count(distance, mean)
        drawn = _draw(mask, k, g)
        counters.padded += int(mask.sum()) < k
        away = torch.cdist(drawn.double(), pixel.double())
        gap, nearest = away.min(1)
        near = gap < settings.farthest
        counters.too_far += int((~near).sum())
        if not near.any():
            continue
        counters.densified += 1
        drawn, nearest = drawn[near], nearest[near]
        n = len(drawn)
        columns.append(
            (
                unproject(drawn, depth[nearest], view).to(points.dtype),
                view.classes[m].expand(n),
                view.scores[m].expand(n),
                torch.full((n,), instance),
                index[nearest],
                drawn,
                torch.full((n,), camera),
            )
        )
    of_class = torch.cat([v.classes for v in views]) if views else torch.zeros(0, dtype=torch.long)
    of_score = torch.cat([v.scores for v in views]) if views else torch.zeros(0)
    real = (owner >= 0).nonzero().squeeze(-1)
    none = torch.zeros(0, dtype=torch.long)
    nothing = (points.new_zeros(0, 3), none, torch.zeros(0), none, none, torch.zeros(0, 2, dtype=torch.long), none)
    xyz, classes, scores, numbers, source, pixels, camera_of = (torch.cat(own) for own in zip(nothing, *columns, strict=True))
    return VirtualPoints(xyz, classes, scores, numbers, source, pixels, camera_of, real, of_class[owner[real]], of_score[owner[real]], counters)


def _draw(mask: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k pixels (column, row) of a mask without replacement; where there are fewer, all of them and the first one drawn again and again.  [k, 2]"""
    inside = mask.nonzero().flip(-1)
    order = torch.randperm(len(inside), generator=generator)[:k]
    drawn = inside[order]
    return drawn if len(drawn) == k else torch.cat([drawn, drawn[:1].expand(k - len(drawn), 2)])


def merged(points: Tensor, added: VirtualPoints, features: int = 3, padding: float = 1.0) -> Tensor:
    """The frame with its virtual points.  [N + M, 3], or [N + M, 15]: x, y, z, class one-hot (10), score, flag

    features: 3 is all that the released network reads.  With 15, raw points have `padding` in the other twelve (1, as the release pads), real points
    inside masks their class, score and flag 0, virtual ones flag -1.  Painted points stand once, in the place of the raw ones; the release has both.
    """
    if features not in FEATURES:
        raise SpecError(f"points have {FEATURES[0]} or {FEATURES[1]} features, got {features}")
    if features == 3:
        return torch.cat([points[:, :3], added.xyz])
    raw = torch.cat([points[:, :3], points.new_full((len(points), 12), padding)], 1)
    raw[added.foreground, 3:] = _painted(added.foreground_classes, added.foreground_scores, REAL_FLAG).to(raw.dtype)
    new = torch.cat([added.xyz, _painted(added.classes, added.scores, VIRTUAL_FLAG).to(raw.dtype)], 1)
    return torch.cat([raw, new])


def _painted(classes: Tensor, scores: Tensor, flag: float) -> Tensor:
    own = F.one_hot(classes.long(), CLASSES).float()
    return torch.cat([own, scores.float().unsqueeze(1), torch.full((len(classes), 1), flag)], 1)
