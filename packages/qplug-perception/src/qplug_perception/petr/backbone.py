"""From images to the one feature map that PETR's decoder reads: a residual network, the first level of a feature pyramid, a projection.

Everything is in torch's own layers, so that batch norms are folded and links are found by tracing.  Convolution and batch norm stand in one
nn.Sequential each.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from qcore.errors import NotFound, SpecError
from torch import Tensor, nn

from qplug_perception.petr.config import PETRConfig


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, and its batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))


class DeformableConv(nn.Module):
    """A modulated deformable 3×3 convolution (DCNv2), one group: each of the nine inputs is read where an offset points, times a mask.

    Its weight stays float: nothing is multiplied with it at fixed places.  `offset`, an ordinary convolution, is quantized as any other.

    Source: https://arxiv.org/abs/1811.11168; channels of `offset` as in mmcv: nine pairs (row, column), then nine masks.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.offset = nn.Conv2d(inputs, 27, 3, stride, 1)
        for p in self.offset.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        moved = self.offset(x)  # [B, 27, h, w]
        mask = moved[:, 18:].sigmoid()
        one = torch.ones_like(moved[:, :1, :, :])
        row, column = (one.cumsum(2)[:, 0] - 1) * self.stride, (one.cumsum(3)[:, 0] - 1) * self.stride
        # places outside the image are zero, those between two pixels what both give; the frame keeps an image of one row from being a point
        framed = F.pad(x, (1, 1, 1, 1))
        y = None
        for k in range(9):
            v = row + (k // 3 - 1) + moved[:, 2 * k]
            u = column + (k % 3 - 1) + moved[:, 2 * k + 1]
            grid = torch.stack([2 * (u + 1) / (x.shape[3] + 1) - 1, 2 * (v + 1) / (x.shape[2] + 1) - 1], -1)
            seen = F.grid_sample(framed, grid, mode="bilinear", padding_mode="zeros", align_corners=True) * mask[:, k : k + 1]
            part = torch.einsum("bchw,nc->bnhw", seen, self.weight[:, :, k // 3, k % 3])
            y = part if y is None else y + part
        return y  # type: ignore[return-value]


class Basic(nn.Module):
    """Two 3×3."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = unit(inputs, width, 3, stride), unit(width, width, 3)
        self.shortcut = unit(inputs, width, 1, stride) if stride > 1 or inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 to four times the width.  caffe: the first strides, else the second"""

    def __init__(self, inputs: int, width: int, stride: int, caffe: bool, deformable: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if caffe else (1, stride)
        self.a = unit(inputs, width, 1, first)
        self.b = nn.Sequential(DeformableConv(width, width, second), nn.BatchNorm2d(width)) if deformable else unit(width, width, 3, second)
        self.c = unit(width, 4 * width, 1)
        self.shortcut = unit(inputs, 4 * width, 1, stride) if stride > 1 or inputs != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))) + self.shortcut(x))


class ResNet(nn.Module):
    """Images [B, 3, H, W] → the outputs of the last two stages, for four stages of strides 16 and 32."""

    def __init__(self, config: PETRConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, config.stem, 7, 2, 3, bias=False), nn.BatchNorm2d(config.stem), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages, inputs, grown = [], config.stem, 4 if config.bottleneck else 1
        for i, (width, count, deformable) in enumerate(zip(config.channels, config.blocks, config.deformable, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(count):
                stride = 2 if i and not j else 1
                blocks.append(Bottleneck(inputs, width, stride, config.caffe, deformable) if config.bottleneck else Basic(inputs, width, stride))
                inputs = grown * width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.widths = (grown * config.channels[-2], grown * config.channels[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        last = x
        for stage in self.stages:
            last, x = x, stage(x)
        return last, x


class Neck(nn.Module):
    """The finer level of a two-level feature pyramid, the only one that PETR reads (CPFPN): lateral 1×1, the coarse one added, 3×3."""

    def __init__(self, widths: tuple[int, int], outputs: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(w, outputs, 1) for w in widths)
        self.smooth = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        fine, coarse = self.lateral[0](fine), self.lateral[1](coarse)
        return self.smooth(fine + F.interpolate(coarse, size=fine.shape[2:], mode="nearest"))


class ImageBranch(nn.Module):
    """Images [B, 3, H, W] → features [B, width, H / 16, W / 16]."""

    def __init__(self, config: PETRConfig) -> None:
        super().__init__()
        self.backbone: nn.Module
        if config.backbone == "resnet":
            self.backbone = ResNet(config)
            widths = self.backbone.widths
        else:
            self.backbone, widths = _from_timm(config.backbone.removeprefix("timm:"))
        self.neck = Neck(widths, config.width)
        self.input_proj = nn.Conv2d(config.width, config.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Any = self.backbone(x)
        return self.input_proj(self.neck(found[0], found[1]))


def _from_timm(name: str) -> tuple[nn.Module, tuple[int, int]]:
    """A network of timm without weights, cut to its features at strides 16 and 32, and their widths."""
    try:
        import timm
    except ImportError as e:
        raise NotFound(f"backbone timm:{name} is a model of timm, which is not installed: pip install timm") from e
    if not timm.is_model(name):
        raise NotFound(f"timm {timm.__version__} has no model {name!r}; `timm.list_models()` lists those it has")
    whole: Any = timm.create_model(name, features_only=True, pretrained=False)
    strides = whole.feature_info.reduction()
    if 16 not in strides or 32 not in strides:
        raise SpecError(f"PETR reads features at strides 16 and 32, timm's {name} gives {strides}")
    at = (strides.index(16), strides.index(32))
    cut: Any = timm.create_model(name, features_only=True, pretrained=False, out_indices=at)
    fine, coarse = cut.feature_info.channels()
    assert all(a < b for a, b in pairwise(cut.feature_info.reduction()))
    return cut, (fine, coarse)
