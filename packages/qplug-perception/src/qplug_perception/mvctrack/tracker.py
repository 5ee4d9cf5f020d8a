"""The voxel tracker: two crops → a volume each → seen from above, side by side → how far the object moved.

As the release, in the manner of P2P and BEVTrack: encoder of 16, 32, 64 and 128 channels, BEV head of 256, 512 and 1024, a global maximum, an MLP to
Δxyz and its deviations.  The heading is not predicted (use_rot = False).

The encoder's sparse convolutions are dense ones under a mask: a submanifold convolution writes only where its input has voxels, a strided one
wherever its kernel touches one.  Batch norms in training see occupied voxels alone, as sparse ones do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from qcore.errors import CheckpointError, SpecError
from torch import Tensor, nn

from qplug_perception.mvctrack.boxes import shifted
from qplug_perception.mvctrack.flow import RealNVP, residual_log_likelihood
from qplug_perception.mvctrack.voxels import CropGrid, crop, voxelize

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class TrackerConfig:
    """All that rebuilds the network.

    half, voxel: of the crop (`CropGrid`);  features: of a point, 3 or 15;  width: channels of the encoder's first stage (release: 16)
    head: of the BEV head's first stage (release: 256);  stages: how often the encoder halves its grid (release: 3)
    use_size: the box's sides are read too (release: car, bus, truck and trailer, not pedestrian)
    """

    half: tuple[float, float, float] = (4.8, 4.8, 1.5)
    voxel: tuple[float, float, float] = (0.3, 0.3, 0.375)
    features: int = 3
    width: int = 8
    head: int = 32
    stages: int = 2
    use_size: bool = True

    def __post_init__(self) -> None:
        if self.features < 3 or self.stages < 1 or self.width < 1:
            raise SpecError(f"a tracker has points of 3 features or more and a stage at least, got {self.features} and {self.stages}")

    @property
    def grid(self) -> CropGrid:
        return CropGrid(self.half, self.voxel)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrackerConfig":
        """The inverse of `to_dict`; CheckpointError for a field that is not one."""
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        if unknown := sorted(set(own) - {f.name for f in fields(cls)}):
            raise CheckpointError(f"a tracker has no setting {unknown[0]!r}; it has {', '.join(f.name for f in fields(cls))}")
        return cls(**own)


class MaskedConv(nn.Module):
    """A 3 × 3 × 3 convolution, batch norm and ReLU on occupied voxels.  stride 1: submanifold; 2: occupied is what the kernel touches"""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.layer = nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, C, Z, Y, X], mask: [B, 1, Z, Y, X] of 0 and 1"""
        if self.stride > 1:
            mask = F.max_pool3d(mask, 3, self.stride, 1)
        if not self.training:
            return F.relu(self.layer(x)) * mask, mask
        norm = self.layer[1]
        assert isinstance(norm, nn.BatchNorm3d)
        x = self.layer[0](x).movedim(1, -1)
        there = mask.squeeze(1) > 0
        rows = F.batch_norm(x[there], norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum or 0.1, norm.eps)
        return torch.zeros_like(x).index_put((there,), F.relu(rows)).movedim(-1, 1), mask


class Encoder(nn.Module):
    """[B, C, Z, Y, X] of voxels → [B, K, Y / 2^stages, X / 2^stages] seen from above: heights become one by a convolution over all of them."""

    def __init__(self, config: TrackerConfig) -> None:
        super().__init__()
        widths = [config.width] + [config.width * 2**i for i in range(1, config.stages + 1)]
        layers = [MaskedConv(config.features, widths[0]), MaskedConv(widths[0], widths[0])]
        for before, after in pairwise(widths):
            layers += [MaskedConv(before, after, stride=2), MaskedConv(after, after)]
        self.layers = nn.ModuleList(layers)
        height = config.grid.shape[0]
        for _ in range(config.stages):
            height = -(-height // 2)
        self.flatten = nn.Sequential(nn.Conv3d(widths[-1], widths[-1], (height, 1, 1), bias=False), nn.BatchNorm3d(widths[-1]), nn.ReLU())
        self.width = widths[-1]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x, mask = layer(x, mask)
        return self.flatten(x).squeeze(2)


class MVCTracker(nn.Module):
    """A batch of pairs of crops → (Δx, Δy, Δz, log-like deviations) [B, 6], metres in the frame of the box before.

    batch: previous, current [B, C, Z, Y, X];  previous_mask, current_mask [B, 1, Z, Y, X];  size [B, 3]: w, l, h of the box
    """

    def __init__(self, config: TrackerConfig = TrackerConfig()) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        h = config.head
        plan = [(2 * self.encoder.width, h, 1), (h, h, 1), (h, 2 * h, 2), (2 * h, 2 * h, 1), (2 * h, 4 * h, 2), (4 * h, 4 * h, 1)]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in plan:
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.bev = nn.Sequential(*layers)
        self.size = nn.Sequential(nn.Linear(3, 4 * h), nn.ReLU(), nn.Linear(4 * h, 4 * h)) if config.use_size else None
        self.mlp = nn.Sequential(nn.Linear(4 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, h), nn.ReLU(), nn.Linear(h, 6))

    def forward(self, batch: Batch) -> Tensor:
        both = torch.cat([batch["previous"], batch["current"]])
        masks = torch.cat([batch["previous_mask"], batch["current_mask"]])
        seen = self.encoder(both, masks)
        before, now = seen.chunk(2)
        own: Tensor = self.bev(torch.cat([before, now], 1)).amax((2, 3))
        if self.size is not None:
            own = own + self.size(batch["size"])
        return self.mlp(own)


def deviations(raw: Tensor) -> Tensor:
    """σ out of the network's last three outputs, between 0 and 1 metre as a sigmoid (the release's choice), never 0."""
    return torch.sigmoid(raw).clamp(min=1e-3)


class TrackingLoss(nn.Module):
    """`flow.residual_log_likelihood` of the tracker's outputs; the flow is learned with it and not needed afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = RealNVP()

    def forward(self, outputs: Tensor, truth: Tensor) -> Tensor:
        return residual_log_likelihood(outputs[:, :3], deviations(outputs[:, 3:]), truth, self.flow)


def pair_batch(pairs: Sequence[tuple[Tensor, Tensor, Tensor]], config: TrackerConfig) -> dict[str, Tensor]:
    """What the network reads of (points before, points now, box before) each; points are [N, ≥ features]."""
    grid = config.grid
    columns: dict[str, list[Tensor]] = {name: [] for name in ("previous", "previous_mask", "current", "current_mask", "size")}
    for before, now, box in pairs:
        for name, points in (("previous", before), ("current", now)):
            if points.shape[1] < config.features:
                raise SpecError(f"points have {points.shape[1]} features, this tracker reads {config.features}")
            mean, mask = voxelize(crop(points[:, : config.features], box, grid), grid)
            columns[name].append(mean)
            columns[f"{name}_mask"].append(mask)
        columns["size"].append(box[3:6])
    return {name: torch.stack(own) for name, own in columns.items()}


@torch.no_grad()
def track(forward: Callable[[Batch], Tensor], clouds: Sequence[Tensor], first: Tensor, config: TrackerConfig) -> Tensor:
    """Boxes of all frames, the first one given; each is the one before, moved by what the network says.  [T, 7]"""
    if not clouds:
        raise SpecError("a track has at least one frame")
    boxes = [first]
    for before, now in pairwise(clouds):
        delta = forward(pair_batch([(before, now, boxes[-1])], config))[0, :3]
        boxes.append(shifted(boxes[-1], delta.to(first.dtype).cpu()))
    return torch.stack(boxes)
