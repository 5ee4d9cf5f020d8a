"""Gaussians rendered into a camera, front to back: elliptical weighted averaging in plain torch, differentiable.

    t = W μ + b                 the mean in the camera's frame
    Σ' = J W Σ Wᵀ Jᵀ + 0.3 I    its footprint on the image, pixels²;  J: the Jacobian of the projection at t
    α = o · exp(-½ Δᵀ Σ'⁻¹ Δ)   at a pixel Δ away; below 1/255 it is left out
    w = α · Π (1 - α of those in front)
    features = Σ w f,  depth = Σ w z,  alpha = Σ w

Every pixel is composed over all Gaussians whose footprint may reach it; with `tile` the image is cut into squares, and a square looks only at those
whose footprint touches it.  Both give the same numbers: a footprint's box is exactly where α ≥ 1/255 is possible.

Gaussians of equal depth are ordered by where they fall on the image, so the order in which they are given does not matter.

Source: https://arxiv.org/abs/2308.04079 (Kerbl et al. 2023), section 4 and appendix A.  Differs: α is not capped at 0.99, features of any number of
channels, and the gradient is autograd's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from qcore.errors import SpecError
from torch import Tensor

from qplug_perception.gsrender.gaussians import Gaussians
from qplug_perception.gsrender.geometry import Camera, transform

CUT = 1 / 255
BLUR = 0.3
NEAR = 0.2
_ELEMENTS = 1 << 22  # pixels × Gaussians that are composed at once


@dataclass(frozen=True)
class Rendered:
    """features: [C, P];  depth: [P] Σ w z, in metres along the camera's axis;  alpha: [P] Σ w;  P pixels, row by row"""

    features: Tensor
    depth: Tensor
    alpha: Tensor

    @property
    def mean_depth(self) -> Tensor:
        """Σ w z / Σ w, which sparse LiDAR supervises [I]; 0 where nothing was met.  [P]"""
        return self.depth / torch.where(self.alpha > 0, self.alpha, 1.0)


@dataclass(frozen=True)
class Splats:
    """Gaussians on an image, front to back.

    centre: [n, 2] pixels;  conic: [n, 3] a, b, c of Σ'⁻¹ = [[a, b], [b, c]];  depth: [n];  half: [n, 2] half the box in which α ≥ 1/255
    order: [n] their indices in the set that was given
    """

    centre: Tensor
    conic: Tensor
    depth: Tensor
    half: Tensor
    order: Tensor


def project(gaussians: Gaussians, camera: Camera, *, near: float = NEAR, blur: float = BLUR, limit: float = 1.3) -> Splats:
    """The footprints of those Gaussians that lie before the camera and may touch its image.

    near:  nearest depth;  blur: pixels² that are added to each footprint, so that none is thinner than a pixel
    limit: J is taken no further out than this multiple of the field of view, where it grows without bound
    """
    rotation = camera.world_to_camera[:3, :3]
    t = transform(camera.world_to_camera, gaussians.means)
    ahead = (t[:, 2] > near) & (gaussians.opacity >= CUT)
    index = ahead.nonzero().squeeze(-1)
    t, opacity = t[index], gaussians.opacity[index]
    height, width = camera.size
    fx, fy, cx, cy = (camera.intrinsics[i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    z = t[:, 2]
    centre = torch.stack([fx * t[:, 0] / z + cx, fy * t[:, 1] / z + cy], -1)
    x = z * torch.minimum(torch.maximum(t[:, 0] / z, -limit * cx / fx), limit * (width - cx) / fx)
    y = z * torch.minimum(torch.maximum(t[:, 1] / z, -limit * cy / fy), limit * (height - cy) / fy)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * x / z**2, zero, fy / z, -fy * y / z**2], -1).reshape(-1, 2, 3)
    to_image = jacobian @ rotation
    sigma = to_image @ gaussians.covariances()[index] @ to_image.transpose(-1, -2)
    a, b, c = sigma[:, 0, 0] + blur, sigma[:, 0, 1], sigma[:, 1, 1] + blur
    det = a * c - b * b
    with torch.no_grad():
        reach = 2 * torch.log(opacity.detach() / CUT)  # ΔᵀΣ'⁻¹Δ at which α = 1/255
        half = (reach.clamp(min=0).unsqueeze(-1) * torch.stack([a, c], -1).detach()).sqrt()
        edge = torch.tensor([width, height], dtype=centre.dtype, device=centre.device)
        touches = ((centre + half >= 0) & (centre - half <= edge)).all(-1)
        order = _front_to_back(z, centre)
        order = order[touches[order]]
    conic = torch.stack([c / det, -b / det, a / det], -1)
    return Splats(centre[order], conic[order], z[order], half[order], index[order])


def _front_to_back(depth: Tensor, centre: Tensor) -> Tensor:
    """Indices by depth, then by u, then by v."""
    order = torch.arange(len(depth), device=depth.device)
    for key in (centre[:, 1], centre[:, 0], depth):
        order = order[key[order].argsort(stable=True)]
    return order


def compose(
    splats: Splats, opacity: Tensor, features: Tensor, pixels: Tensor, precision: Literal["float32", "float16"] = "float32"
) -> tuple[Tensor, Tensor, Tensor]:
    """Front-to-back blending at some pixels.  opacity: [n], features: [n, C], both in the splats' order; pixels: [P, 2] → [P, C], [P], [P]"""
    away = pixels.unsqueeze(1) - splats.centre  # [P, n, 2]
    dx, dy = away.unbind(-1)
    a, b, c = splats.conic.unbind(-1)
    alpha = opacity * torch.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
    alpha = torch.where(alpha >= CUT, alpha, 0.0)
    if precision == "float16":
        # where a footprint lies stays float32: at column 1,000 neighbouring float16 numbers are half a pixel apart
        alpha, features = alpha.half().to(alpha.dtype), features.half().to(features.dtype)
    through = torch.cat([torch.ones_like(alpha[:, :1]), torch.cumprod(1 - alpha, 1)[:, :-1]], 1)
    weight = alpha * through
    if precision == "float16":
        weight = weight.half().to(alpha.dtype)
    return weight @ features, weight @ splats.depth, weight.sum(1)


def render(
    gaussians: Gaussians,
    camera: Camera,
    *,
    pixels: Tensor | None = None,
    tile: int | None = None,
    near: float = NEAR,
    blur: float = BLUR,
    precision: Literal["float32", "float16"] = "float32",
) -> Rendered:
    """What the camera sees of the Gaussians: their semantics and their depth.

    pixels: [P, 2] (u, v) of the rays to compose, None = all of the image, row by row
    tile:   side of the squares in which the image is composed; None = all at once.  Not with `pixels`
    precision: in which numbers opacities, features and weights are held: "float16" is the switch of a half-precision rasterizer; sums stay float32
    """
    if tile is not None and (pixels is not None or tile < 1):
        raise SpecError(f"tiles cut a whole image into squares of at least one pixel, got tile={tile}{'' if pixels is None else ' with pixels'}")
    if precision not in ("float32", "float16"):
        raise SpecError(f"a rasterizer's precision is float32 or float16, got {precision!r}")
    splats = project(gaussians, camera, near=near, blur=blur)
    opacity, features = gaussians.opacity[splats.order], gaussians.semantics[splats.order]
    if tile is not None:
        return _tiled(splats, opacity, features, camera, tile, precision)
    wanted = camera.pixels() if pixels is None else pixels
    size = max(1, _ELEMENTS // max(1, len(splats.order)))
    parts = [compose(splats, opacity, features, part, precision) for part in wanted.split(size)]
    f, d, a = (torch.cat(column) for column in zip(*parts, strict=True))
    return Rendered(f.T, d, a)


def _tiled(splats: Splats, opacity: Tensor, features: Tensor, camera: Camera, tile: int, precision: Literal["float32", "float16"]) -> Rendered:
    height, width = camera.size
    where = camera.pixels().reshape(height, width, 2)
    own: dict[str, Tensor] = {}
    parts, places = [], []
    numbers = torch.arange(height * width, device=where.device).reshape(height, width)
    low, high = splats.centre.detach() - splats.half, splats.centre.detach() + splats.half
    for rows, columns in _squares(height, width, tile):
        here = where[rows, columns].reshape(-1, 2)
        meets = ((high >= here.amin(0)) & (low <= here.amax(0))).all(-1)
        few = Splats(splats.centre[meets], splats.conic[meets], splats.depth[meets], splats.half[meets], splats.order[meets])
        parts.append(compose(few, opacity[meets], features[meets], here, precision))
        places.append(numbers[rows, columns].reshape(-1))
    back = torch.cat(places).argsort()
    for name, column in zip(("features", "depth", "alpha"), zip(*parts, strict=True), strict=True):
        own[name] = torch.cat(column)[back]
    return Rendered(own["features"].T, own["depth"], own["alpha"])


def _squares(height: int, width: int, tile: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            yield slice(top, min(top + tile, height)), slice(left, min(left + tile, width))
