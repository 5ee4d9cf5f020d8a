"""The shape of a PETR, as data: what config.json holds.  Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from qcore.errors import SpecError

_TUPLES = ("position_range", "pc_range", "post_range", "blocks", "channels", "deformable", "mean", "std")


@dataclass(frozen=True, kw_only=True)
class PETRConfig:
    """The defaults are PETR-R50-p4 as it was released; Q-PETR is the same with `embedding = "qfpe"`.

    classes, queries, width, heads, layers, feedforward, dropout: of the decoder
    cameras:        how many images belong together
    embedding:      "petr": 64 points on the ray of each pixel, through inverse_sigmoid;  "qfpe": one point between anchors
    depths, depth_start: of "petr": how many depths, and the nearest one, in metres
    anchors, anchor_width, anchor_depth: of "qfpe": locations on each axis, channels of each vector (0 = width / 2), the depth of the one point in
    metres
    position_range: metres (x, y, z nearest, x, y, z farthest) to which positions of pixels are normalized
    pc_range:       the same for the centres of boxes
    post_range:     boxes whose centre lies outside are dropped
    keep:           how many boxes are decoded
    backbone:       "resnet", built here, or "timm:<name>", without weights of its own
    stem, channels, blocks, bottleneck, caffe, deformable: of "resnet".  caffe: a bottleneck strides in its 1×1;  deformable: stages whose 3×3 are
    DCNv2
    mean, std:      what is taken from pixel values 0 … 255, and by what they are divided;  bgr: the order of the colours
    """

    classes: int = 10
    queries: int = 900
    width: int = 256
    heads: int = 8
    layers: int = 6
    feedforward: int = 2048
    dropout: float = 0.1
    cameras: int = 6
    embedding: Literal["petr", "qfpe"] = "petr"
    depths: int = 64
    depth_start: float = 1.0
    anchors: int = 3
    anchor_width: int = 0
    anchor_depth: float = 30.0
    position_range: tuple[float, ...] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    pc_range: tuple[float, ...] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    post_range: tuple[float, ...] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    keep: int = 300
    backbone: str = "resnet"
    stem: int = 64
    channels: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    caffe: bool = True
    deformable: tuple[bool, ...] = (False, False, True, True)
    mean: tuple[float, ...] = (103.53, 116.28, 123.675)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    bgr: bool = True

    def __post_init__(self) -> None:
        for name in ("classes", "queries", "width", "heads", "layers", "feedforward", "cameras", "depths", "keep", "stem"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise SpecError(f"a PETR's {name} is a positive whole number, got {getattr(self, name)!r}")
        if self.width % self.heads or self.width % 4:
            raise SpecError(f"the width of a PETR is divided by its heads and by 4, got width={self.width} and heads={self.heads}")
        if self.embedding not in ("petr", "qfpe"):
            raise SpecError(f"the position embedding is 'petr' or 'qfpe', got {self.embedding!r}")
        if self.anchors < 2:
            raise SpecError(f"positions lie between at least 2 anchors, got anchors={self.anchors}")
        for name in ("position_range", "pc_range", "post_range"):
            r = getattr(self, name)
            if len(r) != 6 or not all(low < high for low, high in zip(r[:3], r[3:], strict=True)):
                raise SpecError(f"{name} is (x, y, z) nearest and (x, y, z) farthest, got {r}")
        if self.depth_start <= 0 or self.depth_start >= self.position_range[3]:
            raise SpecError(f"depth_start lies between 0 and the range's end {self.position_range[3]}, got {self.depth_start}")
        if self.anchor_depth <= 0:
            raise SpecError(f"anchor_depth is a distance before the camera, got {self.anchor_depth}")
        if not self.backbone.startswith("timm:") and self.backbone != "resnet":
            raise SpecError(f"the backbone is 'resnet' or 'timm:<name>', got {self.backbone!r}")
        if not len(self.channels) == len(self.blocks) == len(self.deformable) >= 2:
            raise SpecError(
                f"channels, blocks and deformable have one entry a stage, of two or more, got {self.channels}, {self.blocks}, {self.deformable}"
            )
        if any(self.deformable) and not self.bottleneck:
            raise SpecError("deformable convolutions stand in bottlenecks; set bottleneck = true, or deformable to false in every stage")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote; SpecError for an entry that it does not know."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise SpecError(f"a PETR's config has no entry {unknown[0]!r}; have: {', '.join(sorted(known))}")
        try:
            given: dict[str, Any] = {name: tuple(value) if name in _TUPLES else value for name, value in data.items()}
            return cls(**given)
        except TypeError as e:
            raise SpecError(f"a PETR's config has an entry of the wrong type: {e}") from e
