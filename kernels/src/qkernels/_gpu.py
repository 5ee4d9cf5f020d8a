"""What the Triton kernels have in common: checks of their arguments, the launch with a tile, and what is compiled to prove them without a device."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qkernels import _check, _tiles
from qkernels._check import require_groups

Grid = Callable[[Mapping[str, int]], tuple[int, ...]]
LARGEST = 2**31 - 1  # offset of an element: kernels of linear layers count in 32 bits


@dataclass(frozen=True)
class Case:
    """One compilation of a kernel: what the report lists, and what must be in its assembly.

    signature: argument → Triton type, in order, without the constants
    mma:       it multiplies matrices, so tensor-core instructions have to be there
    tiles:     its name in `_tiles.CANDIDATES`, where it has tiles to choose from
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    mma: bool
    warps: int = 4
    stages: int = 2
    tiles: str | None = None

    def with_tile(self, tile: _tiles.Tile) -> "Case":
        return replace(self, constants={**self.constants, **tile.blocks}, warps=tile.warps, stages=tile.stages)


def tiled(name: str, kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], tiles: str) -> Case:
    """A kernel that multiplies matrices, with its default tile."""
    return Case(name, kernel, signature, constants, mma=True, tiles=tiles).with_tile(_tiles.default(tiles))


def launch(
    kernel: Any, tiles: str, grid: Grid, arguments: Sequence[Any], constants: Mapping[str, Any], *, size: int, block: int | None = None
) -> None:
    """Run a kernel with the fastest of the tiles that the compiler left for this GPU, found at the first call for its shapes.

    With the default tile where that is not known: under the interpreter, on a GPU that `tiles.json` does not name, with QKERNELS_AUTOTUNE=0.

    grid:  from the tile's blocks
    size:  rows, or tokens of a cache: tiles are timed anew when it reaches another power of four
    block: the most inputs a step may take
    """
    target = _target()
    if target is None or not _tiles.kept(tiles, target):
        tile = _tiles.default(tiles).within(block)
        kernel[grid](*arguments, **constants, **tile.blocks, num_warps=tile.warps, num_stages=tile.stages)
    else:
        names = tuple(name for name in ("N", "K", "C", *constants) if name in kernel.arg_names)
        _tuner(kernel, tiles, target, block, names, _bucket(size))[grid](*arguments, **constants)


def pieces(rows: int, *widths: int) -> list[slice]:
    """Rows in as many launches as it takes for 32 bits to hold the offset of every element.  widths: of the matrices that have these rows"""
    most = max(1, LARGEST // max(widths) // 64 * 64)  # as well aligned as the whole
    return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]


@cache
def _tuner(kernel: Any, tiles: str, target: str, block: int | None, names: tuple[str, ...], bucket: int) -> Any:
    """`triton.autotune` for one bucket of sizes; it measures anew where an argument of `names` differs, and keeps what it found for the process."""
    import triton

    chosen = {str(tile): tile for tile in (kept.within(block) for kept in _tiles.kept(tiles, target))}
    configs = [triton.Config(dict(tile.blocks), num_warps=tile.warps, num_stages=tile.stages) for tile in chosen.values()]
    return triton.autotune(configs=configs, key=list(names))(kernel)


def _bucket(size: int) -> int:
    return next((end for end in (16, 64, 256, 1024, 4096) if size <= end), 16384)


def _target() -> str | None:
    """The current GPU as `tiles.json` names targets; None where no tile is to be searched."""
    if interpreting() or os.environ.get("QKERNELS_AUTOTUNE") == "0":
        return None
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def require(name: str, t: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """As `_check.require`, and on a GPU."""
    _check.require(name, t, shape, dtypes, like)
    if t.device.type == "cpu" and not interpreting():
        raise ValueError(f"{name}: is on cpu; allowed: a GPU (or TRITON_INTERPRET=1 before the first import, for tests)")


def rows_of(x: Tensor) -> Tensor:
    """[..., K] → [T, K], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def block_of_group(groups: int, k: int, least: int, most: int = 128) -> int:
    """The largest power of two up to `most` that divides a group of the argument `scale`."""
    group = require_groups("scale", groups, k, least)
    size = most
    while group % size:
        size //= 2
    return size
