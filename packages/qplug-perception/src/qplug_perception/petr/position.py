"""Where the pixels of several cameras lie in space, and what PETR makes of it: 64 points on each ray, normalized, through inverse_sigmoid.

Source: PETR, https://arxiv.org/abs/2203.05625, section 3.2, and the release's `PETRHead.position_embeding`.

Differs from the release: matrices are inverted in float64 on the device, not one by one in numpy; a matrix without an inverse is an error and not
a NaN that is found in the loss.
"""

import math

import torch
from qcore.errors import SpecError
from torch import Tensor, nn

EPS = 1e-5  # of the release: the nearest depth, and the ends of inverse_sigmoid


def lid_depths(count: int, start: float, end: float) -> Tensor:
    """d_i = start + i·(i + 1)·(end - start) / (count·(count + 1)): linearly increasing steps.  [count] float64"""
    i = torch.arange(count, dtype=torch.float64)
    return start + i * (i + 1) * (end - start) / (count * (count + 1))


def inverse_sigmoid(x: Tensor, eps: float = EPS) -> Tensor:
    """log(x / (1 - x)) of x clamped to [0, 1], numerator and denominator at least eps: no larger than 11.52."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def image_to_lidar(lidar2img: Tensor) -> Tensor:
    """The inverse of each camera's matrix.  [..., 4, 4], computed in float64; SpecError for one that has none"""
    if lidar2img.shape[-2:] != (4, 4):
        raise SpecError(f"lidar2img holds 4 × 4 matrices, got shape {tuple(lidar2img.shape)}")
    inverse, info = torch.linalg.inv_ex(lidar2img.double())
    if bool(info.any()) or not bool(torch.isfinite(inverse).all()):
        raise SpecError("a matrix of lidar2img is singular or not finite; it is projection · extrinsics, with (0, 0, 0, 1) as its last row")
    return inverse


def pixel_points(lidar2img: Tensor, grid: tuple[int, int], image: tuple[int, int], depths: Tensor) -> Tensor:
    """Points on the ray of each cell of a feature map, in the frame of the LiDAR.

    lidar2img: [B, N, 4, 4], space in metres → (u·d, v·d, d, 1), d the depth before the camera
    grid:      rows and columns of the feature map
    image:     height and width of the (padded) image in pixels
    depths:    [D], metres
    return:    [B, N, rows, columns, D, 3] in the dtype of lidar2img

    Cell (i, j) stands for pixel (j·width / columns, i·height / rows), its upper left corner, as in the release.
    """
    (rows, columns), (height, width) = grid, image
    device = lidar2img.device
    v = torch.arange(rows, dtype=torch.float64, device=device) * (height / rows)
    u = torch.arange(columns, dtype=torch.float64, device=device) * (width / columns)
    d = depths.to(device, torch.float64)
    near = d.clamp(min=EPS)
    homogeneous = torch.stack(
        torch.broadcast_tensors(u[None, :, None] * near, v[:, None, None] * near, d[None, None, :], torch.ones_like(d)), -1
    )  # [rows, columns, D, 4]
    points = torch.einsum("bnij,hwdj->bnhwdi", image_to_lidar(lidar2img)[..., :3, :], homogeneous)
    return points.to(lidar2img.dtype)


def normalized(points: Tensor, position_range: tuple[float, ...]) -> Tensor:
    """Metres → 0 … 1 inside the range, axis by axis.  [..., 3]"""
    low, high = points.new_tensor(position_range[:3]), points.new_tensor(position_range[3:])
    return (points - low) / (high - low)


def sine_of_places(mask: Tensor, features: int) -> Tensor:
    """The sine embedding of camera, row and column of several views.

    mask:     [B, N, rows, columns] bool, True where the image is padding
    features: channels for each of the three
    return:   [B, N, 3·features, rows, columns]: camera, row, column

    Source: the release's SinePositionalEncoding3D with normalize=True.
    """
    there = (~mask).float()
    places = [there.cumsum(axis) for axis in (1, 2, 3)]
    places = [p / (p.narrow(axis, p.shape[axis] - 1, 1) + 1e-6) * (2 * math.pi) for p, axis in zip(places, (1, 2, 3), strict=True)]
    return torch.cat([_waves(p, features) for p in places], -1).permute(0, 1, 4, 2, 3)


def sine_of_points(points: Tensor, features: int) -> Tensor:
    """The sine embedding of points in [0, 1]³, of y first, then x, then z, as in the release.  [..., 3] → [..., 3·features]"""
    y, x, z = points[..., 1], points[..., 0], points[..., 2]
    return torch.cat([_waves(p * (2 * math.pi), features) for p in (y, x, z)], -1)


def _waves(x: Tensor, features: int) -> Tensor:
    i = torch.arange(features, device=x.device)
    angles = x.unsqueeze(-1) / (10000.0 ** (2 * (i // 2) / features)).to(x.dtype)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-2)


def pointwise_mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two 1×1 convolutions with a ReLU between."""
    return nn.Sequential(nn.Conv2d(inputs, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, outputs, 1))


class PETREmbedding(nn.Module):
    """PETR's 3-D position encoder: `depths` points a pixel, inverse_sigmoid of their coordinates, and a two-layer perceptron.

    position_range: see PETRConfig
    """

    def __init__(self, width: int, depths: int, depth_start: float, position_range: tuple[float, ...]) -> None:
        super().__init__()
        self.position_range = position_range
        self.mlp = pointwise_mlp(3 * depths, 4 * width, width)
        self.register_buffer("depths", lid_depths(depths, depth_start, position_range[3]), persistent=False)

    depths: Tensor

    def coordinates(self, lidar2img: Tensor, grid: tuple[int, int], image: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What the perceptron reads, [B, N, 3·depths, rows, columns], and which cells lie outside, [B, N, rows, columns] bool.

        A cell lies outside where more than half as many of its 3·depths coordinates as there are depths do.  The release computes this flag and
        uses it for nothing.  Channels are ordered depth by depth, x, y, z of each.
        """
        points = normalized(pixel_points(lidar2img, grid, image, self.depths), self.position_range)
        outside = ((points > 1) | (points < 0)).flatten(-2).sum(-1) > 0.5 * len(self.depths)
        return inverse_sigmoid(points).flatten(-2).permute(0, 1, 4, 2, 3), outside

    def forward(self, lidar2img: Tensor, grid: tuple[int, int], image: tuple[int, int]) -> Tensor:
        """[B, N, 4, 4] → [B, N, width, rows, columns]; arguments as in `pixel_points`"""
        x, _ = self.coordinates(lidar2img, grid, image)
        return self.mlp(x.flatten(0, 1)).unflatten(0, x.shape[:2])
