"""The Gaussian head: one Gaussian of every voxel, G = (μ + δμ, s + δs, r, o, c).

μ is the voxel's centre, s a base scale, r the identity; a 1 × 1 × 1 convolution for each attribute predicts δμ, δs, o and c from the volume.

Parameterisation ([I], the paper gives none):

    δμ = reach · voxel/2 · tanh(·)               bounded: a Gaussian stays within `reach` half voxels of its centre
    scale = softplus(softplus⁻¹(voxel/2) + δs)   δs = 0 is the base scale exactly (softplus(log base), as one might read it, is not: 0.182 for 0.2)
    o = sigmoid(·)

Every attribute is tapped where it is to be quantized, at the sites `head.delta_mu:value`, `head.delta_s:value`, `head.opacity:value` and
`head.semantic:value`: the tanh itself, the shift of the log-like scale, the opacity behind its sigmoid, the logits.  There is no convolution and no
scale for all attributes together.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from qcore.errors import SpecError
from qcore.model.tap import tap
from torch import Tensor, nn

from qplug_perception.gsrender.geometry import VoxelGrid

ATTRIBUTES = ("delta_mu", "delta_s", "opacity", "semantic")


@dataclass(frozen=True)
class Gaussians:
    """A set of N Gaussians.

    means: [N, 3];  scales: [N, 3] standard deviations;  opacity: [N] in [0, 1];  semantics: [N, C] logits
    rotations: [N, 3, 3], None = the identity
    """

    means: Tensor
    scales: Tensor
    opacity: Tensor
    semantics: Tensor
    rotations: Tensor | None = None

    def __len__(self) -> int:
        return len(self.means)

    def covariances(self) -> Tensor:
        """R S Sᵀ Rᵀ.  [N, 3, 3]"""
        if self.rotations is None:
            return torch.diag_embed(self.scales.square())
        spread = self.rotations * self.scales.unsqueeze(-2)
        return spread @ spread.transpose(-1, -2)

    def kept(self, mask: Tensor) -> "Gaussians":
        """Those that the mask (or the indices) names."""
        turned = None if self.rotations is None else self.rotations[mask]
        return Gaussians(self.means[mask], self.scales[mask], self.opacity[mask], self.semantics[mask], turned)


@dataclass(frozen=True)
class Attributes:
    """What the head predicts for V voxels, before it is laid out in space.

    delta_mu: [..., V, 3] in [-1, 1];  delta_s: [..., V, 3];  opacity: [..., V, 1] in [0, 1];  semantic: [..., V, C]
    """

    delta_mu: Tensor
    delta_s: Tensor
    opacity: Tensor
    semantic: Tensor

    def rows(self) -> Tensor:
        """All of a voxel behind one another, in the order of `ATTRIBUTES`: for transport alone.  [..., V, 7 + C]"""
        return torch.cat([self.delta_mu, self.delta_s, self.opacity, self.semantic], -1)

    @classmethod
    def from_rows(cls, rows: Tensor) -> "Attributes":
        """The inverse of `rows`."""
        return cls(rows[..., :3], rows[..., 3:6], rows[..., 6:7], rows[..., 7:])

    def gaussians(self, grid: VoxelGrid, reach: float) -> Gaussians:
        """Laid out in space.  Attributes of one sample: [V, …] each"""
        if self.delta_mu.ndim != 2 or len(self.delta_mu) != grid.count:
            raise SpecError(f"attributes of one sample are [{grid.count}, 3] …, got δμ of shape {tuple(self.delta_mu.shape)}")
        means = grid.centres(self.delta_mu) + reach * grid.voxel / 2 * self.delta_mu
        base = math.log(math.expm1(grid.voxel / 2))
        return Gaussians(means, F.softplus(self.delta_s + base), self.opacity.squeeze(-1), self.semantic)

    def occupancy(self, threshold: float, free: int) -> Tensor:
        """argmax of the logits where the opacity is above τ, else `free`.  [..., V] int64"""
        return torch.where(self.opacity.squeeze(-1) > threshold, self.semantic.argmax(-1), free)


class Attribute(nn.Module):
    """One attribute of each voxel: a 1 × 1 × 1 convolution and what bounds it, tapped as rows [V, channels] under the name "value"."""

    def __init__(self, inputs: int, channels: int, bound: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, channels, 1)
        self.bound = bound

    def forward(self, volume: Tensor) -> Tensor:
        """[B, K, X, Y, Z] → [B, X·Y·Z, channels]"""
        own: Tensor = self.bound(self.conv(volume)).flatten(2).transpose(1, 2)
        return tap(self, "value", own)


class GaussianHead(nn.Module):
    """volume [B, K, X, Y, Z] → the attributes of one Gaussian a voxel.

    classes: L - 1, without "free": that is what a low opacity says
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.delta_mu = Attribute(inputs, 3, nn.Tanh())
        self.delta_s = Attribute(inputs, 3, nn.Identity())
        self.opacity = Attribute(inputs, 1, nn.Sigmoid())
        self.semantic = Attribute(inputs, classes, nn.Identity())

    def forward(self, volume: Tensor) -> Attributes:
        return Attributes(self.delta_mu(volume), self.delta_s(volume), self.opacity(volume), self.semantic(volume))
