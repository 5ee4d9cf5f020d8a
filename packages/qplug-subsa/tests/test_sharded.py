"""Two processes with gloo choose what one chooses."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from qcore.errors import SpecError
from qplug_subsa.sharded import _lam, share_of
from qplug_subsa.subsa import SubSA

# one pair of processes for all cases: each of them imports torch
WORKER = """
import json, sys
from pathlib import Path
import numpy as np, torch.distributed as dist
from qcore.errors import QcoreError
from qplug_subsa.sharded import select_sharded, share_of
from qplug_subsa.subsa import SubSA
dist.init_process_group("gloo")
rank, size, folder = dist.get_rank(), dist.get_world_size(), Path(sys.argv[1])
out = {}
for lam in (1.0, "auto"):
    out[f"one file, {lam}"] = select_sharded(share_of([folder / "all.npy"], rank, size), 60, SubSA(lam)).indices
    out[f"two files, {lam}"] = select_sharded(share_of([folder / "a.npy", folder / "b.npy"], rank, size), 60, SubSA(lam)).indices
every = select_sharded(share_of([folder / "a.npy", folder / "b.npy"], rank, size), 301)
out["all"], out["gains"] = every.indices, every.gains
for name, k in (("nan", 5), ("budget", 302)):
    try:
        select_sharded(share_of([folder / "a.npy", folder / ("nan.npy" if name == "nan" else "b.npy")], rank, size), k)
    except QcoreError as e:
        out[name] = f"{type(e).__name__}: {e}"
(folder / f"rank{rank}.json").write_text(json.dumps(out))
dist.destroy_process_group()
"""


def test_two_processes_choose_what_one_chooses(clustered, tmp_path):
    x = np.concatenate([clustered(201), clustered(201)[:100]])  # copies on both sides of the cut
    np.save(tmp_path / "all.npy", x)
    np.save(tmp_path / "a.npy", x[:30])  # very different shares
    np.save(tmp_path / "b.npy", x[30:])
    bad = x[30:].copy()
    bad[7, 2] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    rendezvous = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], env=rendezvous | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    for lam in (1.0, "auto"):
        alone = SubSA(lam).select(x, 60)
        assert first[f"one file, {lam}"] == first[f"two files, {lam}"] == alone
    whole = SubSA().run(x, 301)
    assert first["all"] == list(whole.indices) and np.allclose(first["gains"], whole.gains)
    assert "another process" in first["nan"] and "row 7 of process 1" in second["nan"]
    assert first.pop("nan") != second.pop("nan") and first == second
    assert "302" in first["budget"] and "301" in first["budget"]


def test_every_row_has_one_owner(points, tmp_path):
    np.save(tmp_path / "x.npy", points)
    for size in (1, 2, 7):
        shares = [share_of([tmp_path / "x.npy"], rank, size) for rank in range(size)]
        assert np.array_equal(np.concatenate([s.block(0, s.shape[0]).copy() for s in shares]), points)
        assert np.array_equal(shares[-1].take(np.array([2, 0])), points[[240 - shares[-1].shape[0] + 2, 240 - shares[-1].shape[0]]])
    with pytest.raises(SpecError, match="2 files for 3 processes"):
        share_of([tmp_path / "x.npy"] * 2, 0, 3)


def test_a_lambda_that_is_no_number_is_refused():
    assert _lam("auto") == "auto" and _lam("0.5") == 0.5
    with pytest.raises(SpecError, match="got 'much'"):
        _lam("much")
