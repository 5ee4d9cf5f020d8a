"""What Gaussians are trained on: depth and classes of pixels, in the cameras of the same moment and of neighbouring ones.

**Ray compensation.**  One view per place and time leaves the depth along a ray open: behind the first surface anything may stand.  The text that is
available says that the paper "compensates features from adjacent frames"; the mechanism here is inferred [I]: the Gaussians of time t are rendered
into the cameras of t' and held to the labels of t' (`views_of`, `supervise`).  Rendering moves the camera, not the Gaussians: a world-to-camera
pose T_{t→t'} = pose_{t'}⁻¹ · pose_t is composed with the extrinsics.

**Dynamic objects** move between t and t', so pixels of t' that show them say nothing of t and are left out.  RenderOcc's list, [0, 1, 3, 4, 5, 7, 9,
10], forgets bicycle (2) and motorcycle (6) and drops barriers (1), which stand still; `DYNAMIC` is the corrected one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from qcore.errors import SpecError
from torch import Tensor

from qplug_perception.gsrender.gaussians import Gaussians
from qplug_perception.gsrender.geometry import Camera, invert
from qplug_perception.gsrender.render import Rendered, render

# bicycle, bus, car, construction vehicle, motorcycle, pedestrian, trailer, truck, of Occ3D-nuScenes' classes
DYNAMIC = (2, 3, 4, 5, 6, 7, 9, 10)
IGNORED = 255
NEIGHBOUR_WEIGHT = 0.3  # RenderOcc's weight of rays of adjacent frames
_SMALL = 1e-6


def silog(predicted: Tensor, target: Tensor, mask: Tensor, focus: float = 0.85) -> Tensor:
    """√(mean(e²) - focus · mean(e)²) with e = log predicted - log target, over the pixels of the mask; 0 without any.

    focus: 1 forgives a common factor of all depths, 0 is the root mean square
    Source: https://arxiv.org/abs/1406.2283 (Eigen et al. 2014), equation 4; the root and 0.85 are those of BTS and RenderOcc.
    """
    if not 0 <= focus <= 1:
        raise SpecError(f"the variance focus is between 0 and 1, got {focus}")
    if not mask.any():
        return predicted.sum() * 0.0
    error = torch.log(predicted[mask].clamp(min=_SMALL)) - torch.log(target[mask])
    # the root has no slope at 0, where every depth is right
    return (error.square().mean() - focus * error.mean().square()).clamp(min=_SMALL**2).sqrt()


def class_weights(counts: Tensor) -> Tensor:
    """1 / log(n_c), RenderOcc's weight of a class that n_c voxels have.  [L] → [L]; SpecError for counts below 2, which have no such weight"""
    if (counts < 2).any():
        bad = int((counts < 2).nonzero()[0])
        raise SpecError(f"class {bad} has {int(counts[bad])} voxels; 1/log(n) wants at least 2 of each: merge classes, or count more scenes")
    return 1 / torch.log(counts.double()).float()


def balance_weights(counts: Tensor, rate: float = 0.005) -> Tensor:
    """exp(rate · (max n / n_c - 1)), by which RenderOcc draws rays of rare classes more often.  [L] → [L]"""
    return torch.exp(rate * (counts.max() / counts.clamp(min=1) - 1))


def semantic_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of rendered logits [C, P] and labels [P]; pixels of `IGNORED` do not count; 0 without any other."""
    if not (labels != IGNORED).any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits.T, labels, weight=weights, ignore_index=IGNORED)


def opacity_entropy(opacity: Tensor) -> Tensor:
    """Mean -o log o - (1 - o) log(1 - o): small where each Gaussian is there or not.  Optional [I], in the place of NeRF's entropy and distortion."""
    o = opacity.clamp(_SMALL, 1 - _SMALL)
    return -(o * o.log() + (1 - o) * (1 - o).log()).mean()


def lift_depth_loss(logits: Tensor, depth: Tensor, start: float, step: float) -> Tensor:
    """Cross-entropy of the lift's depth bins.  logits: [n, D]; depth: [n] metres, 0 = unknown; bin i is [start + i·step, start + (i + 1)·step)"""
    target = ((depth - start) / step).floor().long()
    known = (depth > 0) & (target >= 0) & (target < logits.shape[1])
    return F.cross_entropy(logits[known], target[known]) if known.any() else logits.sum() * 0.0


@dataclass(frozen=True)
class View:
    """Labels of one camera at one moment.

    camera: for points in the vehicle's frame at time t
    depth:  [P] metres, 0 = none;  labels: [P] classes, IGNORED = none;  pixels: [P, 2] of the rays, None = all of the image, row by row
    weight: of this view's loss;  neighbour: of another moment than t
    """

    camera: Camera
    depth: Tensor
    labels: Tensor
    pixels: Tensor | None = None
    weight: float = 1.0
    neighbour: bool = False


def views_of(cameras: Sequence[Camera], depths: Tensor, labels: Tensor, pose: Tensor, other: Tensor, weight: float = NEIGHBOUR_WEIGHT) -> list[View]:
    """The cameras of time t', as views for Gaussians of time t.  With t' = t they are t's own views, of weight 1.

    cameras: of t', for points in the vehicle's frame at t';  depths, labels: [n, P];  pose, other: vehicle_to_world at t and t'
    """
    same = torch.equal(pose, other)
    between = torch.eye(4, dtype=pose.dtype) if same else invert(other) @ pose
    return [View(c.moved(between), d, s, weight=1.0 if same else weight, neighbour=not same) for c, d, s in zip(cameras, depths, labels, strict=True)]


@dataclass(frozen=True)
class LossSettings:
    """Weights of the terms (RenderOcc's values), and which pixels count.

    farthest: depths beyond are no labels;  dynamic: classes that a neighbouring view leaves out;  normalise: depth is Σ w z / Σ w [I]
    """

    depth: float = 1.0
    semantic: float = 1.0
    entropy: float = 0.0
    focus: float = 0.85
    farthest: float = 52.0
    dynamic: tuple[int, ...] = DYNAMIC
    normalise: bool = True


def is_dynamic(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Which labels are among the movable classes.  [P] bool"""
    return torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype, device=labels.device))


def supervise(gaussians: Gaussians, views: Sequence[View], settings: LossSettings = LossSettings(), weights: Tensor | None = None) -> Tensor:
    """The loss of a set of Gaussians over views of its own moment and of neighbours: the sum of each view's terms, by its weight.

    weights: [C] of the classes in the cross-entropy
    """
    if not views:
        raise SpecError("a loss wants at least one view")
    total = settings.entropy * opacity_entropy(gaussians.opacity) if settings.entropy else gaussians.opacity.new_zeros(())
    for view in views:
        seen = render(gaussians, view.camera, pixels=view.pixels)
        total = total + view.weight * view_loss(seen, view, settings, weights)
    return total


def view_loss(seen: Rendered, view: View, settings: LossSettings, weights: Tensor | None = None) -> Tensor:
    """Depth and class terms of one rendered view."""
    left_out = is_dynamic(view.labels, settings.dynamic) if view.neighbour else torch.zeros_like(view.labels, dtype=torch.bool)
    depth = seen.mean_depth if settings.normalise else seen.depth
    # where nothing was rendered there is no depth to compare: the class term pulls Gaussians there
    known = (view.depth > 0) & (view.depth <= settings.farthest) & ~left_out & (seen.alpha > 0)
    labels = torch.where(left_out, IGNORED, view.labels)
    return settings.depth * silog(depth, view.depth, known, settings.focus) + settings.semantic * semantic_loss(seen.features, labels, weights)
