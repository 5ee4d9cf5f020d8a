"""The tile sizes that a Triton kernel which multiplies matrices may run with.

Declared here, struck out by the compiler: `python tools/bench/triton_report.py --tiles` compiles every candidate for every target and writes
`tiles.json` beside this file.  A candidate that spills registers, needs more shared memory than the target has, or multiplies without tensor cores is
never tried on a GPU.  What is left is timed on the device by `triton.autotune` (`_gpu.launch`).  A tile changes no meaning: sums over k are added
up in another order in float32, and that is all.

The report compiles groups of 128.  Smaller groups shrink BK on the way (`Tile.within`); such steps are smaller than any that it compiled.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Tile:
    """blocks: the kernel's constants that may differ: BT rows × BN outputs × BK inputs, or BS tokens of a cache"""

    blocks: Mapping[str, int]
    warps: int
    stages: int

    def __str__(self) -> str:
        return " ".join([*(f"{name}={size}" for name, size in self.blocks.items()), f"warps={self.warps}", f"stages={self.stages}"])

    def within(self, block: int | None) -> "Tile":
        """The same with at most so many inputs a step: a step never crosses a group of the weight."""
        if block is None or self.blocks["BK"] <= block:
            return self
        return Tile({**self.blocks, "BK": block}, self.warps, self.stages)


def _linear(*sizes: tuple[int, int, int, int, int]) -> tuple[Tile, ...]:
    return tuple(Tile({"BT": bt, "BN": bn, "BK": bk}, warps, stages) for bt, bn, bk, warps, stages in sizes)


# up to 16 rows: what counts is to have many bytes of the weight on their way
FEW = _linear(
    (16, 64, 64, 4, 2),
    (16, 64, 64, 4, 4),
    (16, 32, 128, 4, 3),
    (16, 64, 128, 4, 3),
    (16, 128, 64, 8, 3),
)
# more: what counts is how often an input and a decoded weight are used
MANY = _linear(
    (64, 64, 64, 8, 2),
    (32, 64, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (128, 128, 64, 8, 3),
)
CACHE = (
    Tile({"BS": 32}, 4, 3),
    Tile({"BS": 64}, 4, 2),
    Tile({"BS": 64}, 8, 3),
    Tile({"BS": 128}, 8, 2),
)

# kernel → candidates.  The first is the default: under the interpreter, on GPUs without a table, and where tuning is switched off.
CANDIDATES: Mapping[str, tuple[Tile, ...]] = {
    **{f"{op} few": FEW for op in ("weight_linear", "int_linear", "fp4_linear", "grouped_linear")},
    **{f"{op} many": MANY for op in ("weight_linear", "int_linear", "fp4_linear")},
    # tiles of rows are counted before the launch, so their height is settled
    "grouped_linear many": tuple(tile for tile in MANY if tile.blocks["BT"] == 64),
    "kv_attention": CACHE,
}


def of_rows(op: str, rows: int) -> str:
    """The kernel's name in `CANDIDATES` for so many rows."""
    return f"{op} {'few' if rows <= 16 else 'many'}"


def default(kernel: str) -> Tile:
    return CANDIDATES[kernel][0]


def kept(kernel: str, target: str | None) -> tuple[Tile, ...]:
    """The candidates that the compiler left for a target; none where the table does not know it."""
    names = _table()["kernels"][kernel].get(target, {}).get("kept", ())
    return tuple(tile for tile in CANDIDATES[kernel] if str(tile) in names)


@cache
def _table() -> dict:
    return json.loads(TABLE.read_text())
