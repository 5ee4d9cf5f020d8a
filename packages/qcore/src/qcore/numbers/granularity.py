"""Over which values one scale is shared: a block shape of the tensor's own rank.

`PerGroup(64).block((512, 256)) == (1, 64)`: one scale for 64 consecutive values of a row.  Everything else in qcore works with the block,
so a new granularity is a class with one method.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from qcore.errors import SpecError

Shape = tuple[int, ...]


@runtime_checkable
class Granularity(Protocol):
    """How a tensor is cut into blocks that share a scale."""

    name: ClassVar[str]

    def block(self, shape: Shape) -> Shape:
        """The block of a tensor of this shape; a SpecError where it does not fit."""


@dataclass(frozen=True)
class Unscaled:
    """No scale at all: the format's numbers stand for themselves (shared exponents, scale-free casts)."""

    name: ClassVar[str] = "unscaled"

    def block(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    name: ClassVar[str] = "tensor"

    def block(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of one axis; axis 0 of a weight [N, K] is its output channels."""

    name: ClassVar[str] = "channel"
    axis: int = 0

    def block(self, shape: Shape) -> Shape:
        if not -len(shape) <= self.axis < len(shape):
            raise SpecError(f"channel axis {self.axis} does not exist in a tensor of shape {shape}")
        axis = self.axis % len(shape)
        return tuple(1 if i == axis else n for i, n in enumerate(shape))


@dataclass(frozen=True)
class PerToken:
    """One scale for each row: all leading axes keep their own, the last is shared.  [..., K]"""

    name: ClassVar[str] = "token"

    def block(self, shape: Shape) -> Shape:
        return (1,) * (len(shape) - 1) + shape[-1:]


@dataclass(frozen=True)
class PerHead:
    """One scale for each head of each token: the last axis is `heads` heads of equal size behind each other.  [..., H·D]

    heads: 0 = those of the place where it is used: rules leave it out, and the site of a q, k or v knows (`Site.heads`)
    """

    name: ClassVar[str] = "head"
    heads: int = 0

    def __post_init__(self) -> None:
        if self.heads < 0:
            raise SpecError(f"heads are counted from 1, got heads={self.heads}")

    def block(self, shape: Shape) -> Shape:
        if not self.heads:
            raise SpecError("granularity 'head' is for q, k and v of an attention, whose heads are known; here use 'token', or 'group' with a size")
        if shape[-1] % self.heads:
            raise SpecError(f"{self.heads} heads do not divide K={shape[-1]}")
        return (1,) * (len(shape) - 1) + (shape[-1] // self.heads,)


@dataclass(frozen=True)
class PerGroup:
    """One scale for `size` consecutive values of the last axis, which it must divide."""

    name: ClassVar[str] = "group"
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SpecError(f"a group has at least 1 value, got size={self.size}")

    def block(self, shape: Shape) -> Shape:
        k = shape[-1]
        if k % self.size:
            near = [d for d in (32, 64, 96, 128, 192, 256) if k % d == 0] or sorted(d for d in range(8, k + 1) if k % d == 0)[:4]
            divisors = ", ".join(map(str, near)) or "none from 8 upwards"
            raise SpecError(f"group size {self.size} does not divide K={k}; use granularity 'channel', or a divisor of {k}: {divisors}")
        return (1,) * (len(shape) - 1) + (self.size,)


@dataclass(frozen=True)
class Tile:
    """One scale for `rows` × `cols` of the last two axes; the tiles at the edges may be smaller."""

    name: ClassVar[str] = "tile"
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise SpecError(f"a tile has at least 1 × 1 values, got {self.rows} × {self.cols}")

    def block(self, shape: Shape) -> Shape:
        if len(shape) < 2:
            raise SpecError(f"tiles need a tensor of two axes or more, got shape {shape}")
        return (1,) * (len(shape) - 2) + (min(self.rows, shape[-2]), min(self.cols, shape[-1]))


@dataclass(frozen=True)
class UnscaledTile(Unscaled):
    """No scale, but `rows` × `cols` of the last two axes share the format's own fitted numbers: a codebook for each tile."""

    name: ClassVar[str] = "unscaled-tile"
    rows: int
    cols: int

    def __post_init__(self) -> None:
        Tile(self.rows, self.cols)

    def block(self, shape: Shape) -> Shape:
        return Tile(self.rows, self.cols).block(shape)


GRANULARITIES: dict[str, type] = {c.name: c for c in (Unscaled, PerTensor, PerChannel, PerToken, PerHead, PerGroup, Tile, UnscaledTile)}


def grid(shape: Shape, block: Shape) -> Shape:
    """How many blocks lie along each axis; an empty axis that one block spans has that one block."""
    return tuple(-(-d // b) if b else 1 for d, b in zip(shape, block, strict=True))


def to_blocks(x: Tensor, block: Shape) -> Tensor:
    """[d0, d1, …] → [g0, g1, …, prod(block)]; blocks at the edges are filled up with zeros."""
    shape = tuple(x.shape)
    g = grid(shape, block)
    padding = [n * b - d for n, b, d in zip(g, block, shape, strict=True)]
    if any(padding):
        x = F.pad(x, [side for p in reversed(padding) for side in (0, p)])
    tiled = x.reshape([n for pair in zip(g, block, strict=True) for n in pair])
    axes = [*range(0, 2 * len(g), 2), *range(1, 2 * len(g), 2)]
    return tiled.permute(axes).reshape(*g, prod(block))


def from_blocks(blocks: Tensor, block: Shape, shape: Shape) -> Tensor:
    """The inverse of `to_blocks`."""
    g = grid(shape, block)
    axes = [axis for i in range(len(g)) for axis in (i, len(g) + i)]
    tiled = blocks.reshape(*g, *block).permute(axes).reshape([n * b for n, b in zip(g, block, strict=True)])
    return tiled[tuple(slice(0, d) for d in shape)]


def spread(s: Tensor, block: Shape, shape: Shape) -> Tensor:
    """Repeat one value per block over its block.  [g0, g1, …] → shape, or what broadcasts to it

    Missing leading axes are of size 1, so that one static scale, [1] or [K], serves activations of any rank.
    """
    s = s.reshape((1,) * (len(shape) - s.ndim) + s.shape)
    for i, (b, d) in enumerate(zip(block, shape, strict=True)):
        if s.shape[i] == 1 and d > 1:
            s = s.expand(*s.shape[:i], d, *s.shape[i + 1 :])
        elif b > 1:
            s = s.repeat_interleave(b, dim=i).narrow(i, 0, d)
    return s


def block_range(x: Tensor, block: Shape) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each block, zero always included.  → two of shape grid(x.shape, block)"""
    blocks = to_blocks(x, block)
    low, high = blocks.aminmax(dim=-1) if blocks.shape[-1] else (blocks.sum(-1), blocks.sum(-1))
    return low.clamp(max=0), high.clamp(min=0)


def repeat_blocks(params: Tensor, block: Shape, shape: Shape) -> Tensor:
    """One vector (or matrix) of parameters per block, repeated for each value of it.  [g0, g1, …, *rest] → [*shape, *rest]"""
    for i, (b, d) in enumerate(zip(block, shape, strict=True)):
        params = params.repeat_interleave(b, dim=i).narrow(i, 0, d)
    return params
