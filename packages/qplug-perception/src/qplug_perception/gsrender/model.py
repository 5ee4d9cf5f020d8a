"""A small occupancy network that ends in the Gaussian head: images → features → lift → volume → one Gaussian a voxel.

It has the shape of the published stack (image backbone, LSS view transform, 3-D network, head) and none of its size: Swin-B, BEVStereo and the
200 × 200 × 16 grid are not here.  One forward pass; everything about rendering belongs to training.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from qcore.errors import CheckpointError, SpecError
from torch import Tensor, nn

from qplug_perception.gsrender.formats import TwoRegion
from qplug_perception.gsrender.fusion import VolumeFusion
from qplug_perception.gsrender.gaussians import GaussianHead
from qplug_perception.gsrender.geometry import CLASSES, VoxelGrid, transform

Batch = Mapping[str, Tensor]
STRIDE = 4


@dataclass(frozen=True)
class OccupancyConfig:
    """All that rebuilds the network.

    low, voxel, shape: of the `VoxelGrid`;  size: (H, W) of an image, divided by 4;  width: channels of features and volume
    start, step, bins: depths of the lift, metres;  reach: see `gaussians.py`;  threshold: τ, the opacity above which a voxel is occupied
    fuse: take the volume of the frame before into voxels that this frame does not see ([I], variant b of ray compensation)
    """

    low: tuple[float, float, float] = (-8.0, -8.0, -1.0)
    voxel: float = 0.8
    shape: tuple[int, int, int] = (20, 20, 4)
    size: tuple[int, int] = (32, 48)
    classes: int = CLASSES
    width: int = 32
    start: float = 0.5
    step: float = 0.5
    bins: int = 24
    reach: float = 1.0
    threshold: float = 0.5
    fuse: bool = False

    def __post_init__(self) -> None:
        if self.size[0] % STRIDE or self.size[1] % STRIDE:
            raise SpecError(f"sides of an image are multiples of {STRIDE}, got {self.size}")
        if not 0 < self.threshold < 1 or self.reach <= 0:
            raise SpecError(f"a threshold lies between 0 and 1 and a reach is positive, got {self.threshold} and {self.reach}")

    @property
    def grid(self) -> VoxelGrid:
        return VoxelGrid(self.low, self.voxel, self.shape)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "OccupancyConfig":
        """The inverse of `to_dict`; CheckpointError for a field that is not one."""
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        if unknown := sorted(set(own) - {f.name for f in fields(cls)}):
            raise CheckpointError(f"an occupancy network has no setting {unknown[0]!r}; it has {', '.join(f.name for f in fields(cls))}")
        return cls(**own)


def _layer2d(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _layer3d(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv3d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]


class Lift(nn.Module):
    """Lift and splat: features of each pixel are spread over depths by predicted chances, and summed in the voxels where they fall.

    The geometry stays in floats and indices, whatever is quantized around it.
    Source: https://arxiv.org/abs/2008.05711 (Philion and Fidler 2020), section 3.
    """

    def __init__(self, config: OccupancyConfig) -> None:
        super().__init__()
        self.config = config
        self.depth = nn.Conv2d(config.width, config.bins, 1)
        self.context = nn.Conv2d(config.width, config.width, 1)

    def forward(self, features: Tensor, intrinsics: Tensor, to_vehicle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(volume [B, K, X, Y, Z], depth logits [B, n, D, h, w], how much of a look each voxel got [B, X, Y, Z]).

        features: [B·n, K, h, w];  intrinsics: [B, n, 3, 3];  to_vehicle: [B, n, 4, 4]
        """
        c, grid = self.config, self.config.grid
        b, n = intrinsics.shape[:2]
        logits, context = self.depth(features), self.context(features)
        chance = logits.softmax(1)
        h, w = features.shape[-2:]
        v, u = (STRIDE * (torch.arange(k, dtype=features.dtype, device=features.device) + 0.5) for k in (h, w))
        d = c.start + c.step * (torch.arange(c.bins, dtype=features.dtype, device=features.device) + 0.5)
        dd, vv, uu = torch.meshgrid(d, v, u, indexing="ij")
        rays = torch.stack([uu * dd, vv * dd, dd], -1).reshape(-1, 3)  # [D·h·w, 3]
        points = transform(to_vehicle.flatten(0, 1), rays @ torch.linalg.inv(intrinsics.flatten(0, 1)).transpose(-1, -2))
        index, inside = grid.index(points)
        index = (index + grid.count * torch.arange(b, device=index.device).repeat_interleave(n).unsqueeze(1)).flatten()
        spread = (chance.unsqueeze(2) * context.unsqueeze(1)).permute(0, 1, 3, 4, 2).reshape(-1, c.width)
        spread = spread * inside.reshape(-1, 1)
        volume = spread.new_zeros(b * grid.count, c.width).index_add(0, index, spread)
        # the share of a ray that has not ended before this depth
        look = (1 - chance.cumsum(1) + chance).flatten() * inside.flatten()
        looked = look.new_zeros(b * grid.count).scatter_reduce(0, index, look, "amax")
        laid = volume.reshape(b, *grid.shape, c.width).permute(0, 4, 1, 2, 3)
        return laid, logits.unflatten(0, (b, n)), looked.reshape(b, *grid.shape)


class OccupancyNet(nn.Module):
    """A batch of samples → the attributes of every voxel's Gaussian, as rows [B, X·Y·Z, 7 + classes].

    batch: images [B, n, 3, H, W] in [0, 1];  intrinsics [B, n, 3, 3];  to_vehicle [B, n, 4, 4]; with `fuse` also those of the frame before as
    before_images, before_intrinsics, before_to_vehicle, and now_to_before [B, 4, 4]
    """

    def __init__(self, config: OccupancyConfig = OccupancyConfig()) -> None:
        super().__init__()
        self.config = config
        k = config.width
        self.encoder = nn.Sequential(*_layer2d(3, k // 2, 2), *_layer2d(k // 2, k, 2), *_layer2d(k, k), *_layer2d(k, k))
        self.lift = Lift(config)
        self.fusion = VolumeFusion(k, config.grid) if config.fuse else None
        self.volume = nn.Sequential(*_layer3d(k, k), *_layer3d(k, k), *_layer3d(k, k))
        self.head = GaussianHead(k, config.classes)

    def lifted(self, batch: Batch, prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """What `Lift` makes of the images of one moment."""
        return self.lift(self.encoder(batch[f"{prefix}images"].flatten(0, 1) - 0.5), batch[f"{prefix}intrinsics"], batch[f"{prefix}to_vehicle"])

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(volume before the head, depth logits of the lift)"""
        volume, logits, looked = self.lifted(batch)
        if self.fusion is not None:
            if "now_to_before" not in batch:
                raise SpecError("this network fuses the frame before; its batch lacks now_to_before, before_images …: ask for `before=True`")
            volume = self.fusion(volume, self.lifted(batch, "before_")[0], batch["now_to_before"], looked)
        return self.volume(volume), logits

    def forward(self, batch: Batch) -> Tensor:
        self._require_threshold()
        return self.head(self.features(batch)[0]).rows()

    def other_threshold(self, fmt: object) -> str:
        """What is wrong with the opacity's numbers, or "": made for another threshold than the network's, τ would not be one of them."""
        if not isinstance(fmt, TwoRegion) or fmt.threshold == self.config.threshold:
            return ""
        return (
            f"head.opacity:value is stored with its regions meeting at {fmt.threshold:g}, but this network's threshold is "
            f"{self.config.threshold:g}; set threshold = {self.config.threshold:g} in the format of the recipe's rule for head.opacity:value"
        )

    def _require_threshold(self) -> None:
        for handler in self.head.opacity.modules():
            if why := self.other_threshold(getattr(getattr(handler, "spec", None), "format", None)):
                raise SpecError(why)
