"""QFPE, Q-PETR's position embedding for quantization: one point a pixel, between learned vectors at fixed anchors.

No value passes an inverse_sigmoid, and what the perceptron reads is a convex combination of the anchors' vectors: never larger than the largest of
them, wherever the point lies.

Inferred, for the paper leaves them open: anchors lie evenly from one end of the range to the other; vectors have width / 2 channels, as the sine
features of the queries have.  The geometry is PETR's with the single depth of 30 m; that the ray leaves the LiDAR's origin rather than the
camera's is how the paper puts it, with the very formula that is used here.

Source: Q-PETR / FQ-PETR, https://arxiv.org/abs/2502.15488, sections on QFPE (v1: QD-PE).  The repository that the paper names holds no code.
"""

import torch
from qcore.errors import SpecError
from torch import Tensor, nn

from qplug_perception.petr.position import pixel_points, pointwise_mlp


class AnchorEmbedding(nn.Module):
    """For each axis, vectors at L_1 < … < L_n, and between them e = ((p - L_i)·E_{i+1} + (L_{i+1} - p)·E_i) / (L_{i+1} - L_i); clamped outside.

    vectors:   [3, n, C], of the axes x, y, z
    locations: [3, n] metres, rising, a buffer
    """

    locations: Tensor

    def __init__(self, locations: Tensor, channels: int) -> None:
        super().__init__()
        if locations.ndim != 2 or locations.shape[0] != 3 or locations.shape[1] < 2 or not bool((locations.diff(dim=1) > 0).all()):
            raise SpecError(f"anchors are two or more rising locations on each of three axes, got {locations.tolist()}")
        self.register_buffer("locations", locations, persistent=False)
        self.vectors = nn.Parameter(torch.empty(3, locations.shape[1], channels))
        nn.init.uniform_(self.vectors, -1, 1)

    @classmethod
    def uniform(cls, position_range: tuple[float, ...], anchors: int, channels: int) -> "AnchorEmbedding":
        """Anchors from end to end of the range, evenly."""
        ends = zip(position_range[:3], position_range[3:], strict=True)
        return cls(torch.stack([torch.linspace(low, high, anchors, dtype=torch.float64) for low, high in ends]), channels)

    def forward(self, points: Tensor) -> Tensor:
        """Metres [..., 3] → [..., 3·C]"""
        out = []
        for axis in range(3):
            at, vectors = self.locations[axis].to(points.dtype), self.vectors[axis]
            p = points[..., axis].clamp(at[0], at[-1])
            i = (torch.searchsorted(at, p.contiguous(), right=True) - 1).clamp(0, len(at) - 2)
            share = ((p - at[i]) / (at[i + 1] - at[i])).clamp(0, 1).unsqueeze(-1)
            out.append(torch.lerp(vectors[i], vectors[i + 1], share.to(vectors.dtype)))
        return torch.cat(out, -1)


class QFPE(nn.Module):
    """Drop-in for `PETREmbedding`: the same arguments, the same shape.

    depth: of the one point on each ray, metres
    """

    def __init__(self, width: int, depth: float, anchors: int, channels: int, position_range: tuple[float, ...]) -> None:
        super().__init__()
        self.position_range = position_range
        self.anchors = AnchorEmbedding.uniform(position_range, anchors, channels)
        self.mlp = pointwise_mlp(3 * channels, 4 * width, width)
        self.register_buffer("depths", torch.tensor([depth], dtype=torch.float64), persistent=False)

    depths: Tensor

    def coordinates(self, lidar2img: Tensor, grid: tuple[int, int], image: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What the perceptron reads, [B, N, 3·C, rows, columns], and which cells lie outside by any coordinate, [B, N, rows, columns] bool."""
        points = pixel_points(lidar2img, grid, image, self.depths).squeeze(-2)
        low, high = points.new_tensor(self.position_range[:3]), points.new_tensor(self.position_range[3:])
        outside = ((points > high) | (points < low)).sum(-1) > 0.5
        return self.anchors(points).permute(0, 1, 4, 2, 3), outside

    def forward(self, lidar2img: Tensor, grid: tuple[int, int], image: tuple[int, int]) -> Tensor:
        """[B, N, 4, 4] → [B, N, width, rows, columns]; arguments as in `pixel_points`"""
        x, _ = self.coordinates(lidar2img, grid, image)
        return self.mlp(x.flatten(0, 1)).unflatten(0, x.shape[:2])
