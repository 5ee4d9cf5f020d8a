"""A set of Gaussians as it is stored or sent: fewer of them, in few bytes each.

| what | how | bytes |
|---|---|---|
| which voxels | one bit for each voxel of the grid | V / 8 |
| position | δμ relative to the voxel's centre, 16-bit integers over its known range | 6 |
| scale | δs, 8-bit integers with one scale and zero point | 3 |
| opacity | `TwoRegion`, 8 bits: the threshold has no error, and none crosses it | 1 |
| classes | logits as an index into a codebook of vectors, fitted by k-means, weighted by opacity | 1 + a share of the book |

Gaussians of an opacity below `prune` are left out before that.  All by qcore's numbers; the paper says nothing of compression.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from qcore.errors import CheckpointError, SpecError
from qcore.numbers import Codebook, Int, Offset, PerTensor, QTensor, QuantSpec, Unscaled, quantize
from torch import Tensor

from qplug_perception.gsrender.formats import TwoRegion
from qplug_perception.gsrender.gaussians import Attributes, Gaussians
from qplug_perception.gsrender.geometry import VoxelGrid

_POSITION = 32767  # 16 bits, symmetric
_SCALES = QuantSpec(format=Int(8), granularity=PerTensor(), offset=Offset.CODE)


@dataclass(frozen=True)
class Compression:
    """How a set is stored.

    prune:   Gaussians of a smaller opacity are left out
    threshold: τ of the network, which stays exact
    codebook: bits of an index into the vectors of logits, 1 to 8
    iterations: of k-means
    """

    prune: float = 0.05
    threshold: float = 0.5
    codebook: int = 6
    iterations: int = 15

    def __post_init__(self) -> None:
        if not 0 <= self.prune < self.threshold < 1:
            raise SpecError(f"want 0 <= prune < threshold < 1, got prune={self.prune} and threshold={self.threshold}: occupied voxels would be lost")
        if not 1 <= self.codebook <= 8:
            raise SpecError(f"an index into the codebook has 1 to 8 bits, got {self.codebook}")

    @property
    def opacity(self) -> QuantSpec:
        return QuantSpec(format=TwoRegion(8, self.threshold, keep_side=True), granularity=Unscaled())


@dataclass(frozen=True)
class CompressedSet:
    """A stored set of n Gaussians on a grid; `tensors` is all that a file holds.

    tensors: mask uint8 [⌈V/8⌉], delta_mu int16 [n, 3], delta_s int8 [n, 3] with its scale and offset, opacity uint8 [n],
             classes uint8 [n], book float16 [k, C]
    """

    grid: VoxelGrid
    reach: float
    settings: Compression
    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.tensors["opacity"])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def attributes(self) -> Attributes:
        """Of every voxel of the grid; voxels without a Gaussian have opacity 0 and logits 0."""
        v, where = self.grid.count, _bits(self.tensors["mask"], self.grid.count)
        scales = QTensor(
            _SCALES, {"codes": self.tensors["delta_s"], "scale": self.tensors["scale"], "offset": self.tensors["offset"]}, (len(self), 3)
        )
        opacity = self.settings.opacity.format.decode(self.tensors["opacity"])
        logits = self.tensors["book"].float()[self.tensors["classes"].long()]

        def spread(own: Tensor) -> Tensor:
            return torch.zeros(v, own.shape[1]).index_copy(0, where, own)

        own = (self.tensors["delta_mu"].float() / _POSITION, scales.dequantize(), opacity.unsqueeze(1), logits)
        return Attributes(*(spread(t) for t in own))

    def gaussians(self) -> Gaussians:
        """The n Gaussians that are stored."""
        return self.attributes().gaussians(self.grid, self.reach).kept(_bits(self.tensors["mask"], self.grid.count))

    def save(self, path: Path) -> None:
        """A safetensors file; `read_set` reads it."""
        from safetensors.torch import save_file

        meta = {"grid": asdict(self.grid), "reach": self.reach, "settings": asdict(self.settings)}
        save_file({k: t.contiguous() for k, t in self.tensors.items()}, path, metadata={"gaussians": json.dumps(meta)})


def read_set(path: Path) -> CompressedSet:
    """What `CompressedSet.save` wrote; CheckpointError where it is something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            meta: dict[str, Any] = json.loads((file.metadata() or {})["gaussians"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a safe_open is no dict
        grid = VoxelGrid(tuple(meta["grid"]["low"]), meta["grid"]["voxel"], tuple(meta["grid"]["shape"]))
        return CompressedSet(grid, meta["reach"], Compression(**meta["settings"]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as e:
        raise CheckpointError(f"{path} holds no compressed set of Gaussians ({type(e).__name__}: {e})") from e


def compress(attributes: Attributes, grid: VoxelGrid, reach: float, settings: Compression = Compression()) -> CompressedSet:
    """Prune and store the Gaussians of one sample.  attributes: [V, …] each"""
    if len(attributes.opacity) != grid.count:
        raise SpecError(f"attributes are those of {grid.count} voxels, got {tuple(attributes.opacity.shape)}")
    opacity = attributes.opacity.squeeze(-1).float()
    kept = (opacity >= settings.prune).nonzero().squeeze(-1)
    if not len(kept):
        raise SpecError(f"no Gaussian has an opacity of {settings.prune:g} or more (the largest is {float(opacity.max()):.3g}); lower `prune`")
    scales = quantize(attributes.delta_s[kept].float(), _SCALES)
    logits = attributes.semantic[kept].float()
    book = QuantSpec(format=Codebook(settings.codebook, dim=logits.shape[1], iterations=settings.iterations), granularity=Unscaled())
    fitted = quantize(logits, book, weight=opacity[kept].unsqueeze(1).expand_as(logits).contiguous())
    tensors = {
        "mask": _mask(kept, grid.count),
        "delta_mu": (attributes.delta_mu[kept].float() * _POSITION).round().clamp(-_POSITION, _POSITION).to(torch.int16),
        "delta_s": scales.codes,
        "scale": scales.parts["scale"],
        "offset": scales.parts["offset"],
        "opacity": settings.opacity.format.encode(opacity[kept]),
        "classes": fitted.codes.reshape(-1),
        "book": fitted.parts["codebook"].half(),
    }
    return CompressedSet(grid, reach, settings, tensors)


def float_bytes(attributes: Attributes) -> int:
    """Bytes of all Gaussians of one sample as float32: 4 · (7 + C) each."""
    return 4 * attributes.rows().numel()


def _mask(kept: Tensor, count: int) -> Tensor:
    """One bit a voxel, low bit first."""
    bits = torch.zeros(-(-count // 8) * 8, dtype=torch.int64)
    bits[kept] = 1
    return (bits.reshape(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def _bits(mask: Tensor, count: int) -> Tensor:
    """Indices of the voxels that the mask names."""
    bits = (mask.long().unsqueeze(1) >> torch.arange(8)) & 1
    return bits.reshape(-1)[:count].nonzero().squeeze(-1)
