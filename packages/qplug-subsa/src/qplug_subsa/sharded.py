"""Sub-SA over embeddings that lie on several machines, under torchrun.

    torchrun --nproc-per-node 2 -m qplug_subsa.sharded embeddings.npy --budget 100 -o chosen.json
    torchrun --nnodes 2 --nproc-per-node 1 … -m qplug_subsa.sharded shard-0.npy shard-1.npy --budget 100 -o chosen.json

One file is divided by rows; of several, each process takes the one with its own rank, and only that one has to be on its disk.  Indices count over
all shards in order.  What is chosen is what one process chooses from all rows: sums are exchanged (d numbers a choice), never rows or kernels.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qcore.errors import QcoreError, SpecError

from qplug_subsa.group import Distributed
from qplug_subsa.objective import Selection
from qplug_subsa.rows import NpyRows, Rows
from qplug_subsa.subsa import SubSA


def share_of(files: Sequence[Path], rank: int, size: int) -> NpyRows:
    """The rows of one process."""
    if len(files) == 1:
        n = NpyRows(files[0]).shape[0]
        return NpyRows(files[0], n * rank // size, n * (rank + 1) // size)
    if len(files) != size:
        raise SpecError(f"{len(files)} files for {size} processes; give one file, or one for each process")
    return NpyRows(files[rank])


def select_sharded(rows: Rows, k: int, selector: SubSA | None = None) -> Selection:
    """The selection over the rows of all ranks of the default process group; every rank gets the whole of it."""
    return (selector or SubSA()).run(rows, k, Distributed(rows.shape[0]))


def _lam(text: str) -> float | Literal["auto"]:
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise SpecError(f"--lam is a number of 0 or more, or auto, got {text!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help=".npy files of one width")
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--lam", default="1.0", help="a number, or auto")
    parser.add_argument("-o", "--out", type=Path, required=True, help="JSON, written by rank 0")
    a = parser.parse_args(argv)
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        found = select_sharded(share_of(a.files, rank, size), a.budget, SubSA(_lam(a.lam)))
        if rank == 0:
            a.out.write_text(json.dumps({"indices": found.indices, "gains": found.gains, "lam": found.lam, "notes": found.notes}) + "\n")
            print(f"{len(found.indices)} chosen over {size} processes; written: {a.out}")
    except QcoreError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
