"""The rasterizer pixel by pixel and Gaussian by Gaussian, in Python's float64: slow, plain, and what render.py is held to."""

import math

import torch

from qplug_perception.gsrender.gaussians import Gaussians
from qplug_perception.gsrender.geometry import Camera
from qplug_perception.gsrender.render import BLUR, CUT, NEAR, Rendered


def render_reference(gaussians: Gaussians, camera: Camera, limit: float = 1.3) -> Rendered:
    """As `render` of a whole image, without gradients."""
    height, width = camera.size
    k = camera.intrinsics.double()
    fx, fy, cx, cy = (float(k[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    w = camera.world_to_camera.double()
    flat = []
    for mean, sigma, opacity, feature in zip(
        gaussians.means.double(), gaussians.covariances().double(), gaussians.opacity.double(), gaussians.semantics.double(), strict=True
    ):
        x, y, z = (w[:3, :3] @ mean + w[:3, 3]).tolist()
        if z <= NEAR:
            continue
        xj = z * min(max(x / z, -limit * cx / fx), limit * (width - cx) / fx)
        yj = z * min(max(y / z, -limit * cy / fy), limit * (height - cy) / fy)
        j = torch.tensor([[fx / z, 0, -fx * xj / z**2], [0, fy / z, -fy * yj / z**2]], dtype=torch.float64) @ w[:3, :3]
        inverse = torch.linalg.inv(j @ sigma @ j.T + BLUR * torch.eye(2, dtype=torch.float64))
        u, v = fx * x / z + cx, fy * y / z + cy
        flat.append((z, u, v, inverse, float(opacity), feature))
    flat.sort(key=lambda own: own[:3])
    features = torch.zeros(gaussians.semantics.shape[1], height * width, dtype=torch.float64)
    depth, alpha = torch.zeros(height * width, dtype=torch.float64), torch.zeros(height * width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            at, through = row * width + column, 1.0
            for z, u, v, inverse, opacity, feature in flat:
                away = torch.tensor([column + 0.5 - u, row + 0.5 - v], dtype=torch.float64)
                a = opacity * math.exp(-0.5 * float(away @ inverse @ away))
                if a < CUT:
                    continue
                features[:, at] += a * through * feature
                depth[at] += a * through * z
                alpha[at] += a * through
                through *= 1 - a
    return Rendered(features, depth, alpha)
