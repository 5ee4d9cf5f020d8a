"""Several processes find what one finds: as threads with a board between them, and as real processes with gloo."""

import copy
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from qcore.checkpoint.journal import Journal
from qcore.errors import CalibrationError, Stopped
from qcore.numbers import Int, PerTensor, QuantSpec, int_weight
from qcore.pipeline import Quantized, load_in_memory, quantize_model
from qcore.pipeline.sites import shared_out
from qcore.plugins.registry import Registry
from qcore.processes import Alone, Processes, of_this_run
from qcore.recipe import Recipe, Rule
from qcore.solvers import GPTQ, RTN
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from qcore.transforms import AWQScale

BATCHES = [tokens(seed=s) for s in range(5)]
INT8 = QuantSpec(format=Int(8), granularity=PerTensor())
RECIPES = {
    "gptq": Recipe(rules=(Rule("*:weight", int_weight(3, 16)),), solver=GPTQ()),
    "static inputs and taps": Recipe(
        rules=(Rule("*:weight", int_weight(4, 16)), Rule("*:input", INT8), Rule("*:k", INT8)), solver=RTN(), propagate="all"
    ),
    "awq": Recipe(rules=(Rule("*:weight", int_weight(4, 16)),), transforms=(AWQScale(grid=3),), solver=RTN()),
}


class Board:
    """Where threads lay what they share.  gone: a thread that has ended with an error breaks it for the others"""

    def __init__(self, count: int) -> None:
        self.barrier, self.places = threading.Barrier(count), [None] * count


class Thread(Processes):
    def __init__(self, rank: int, board: Board) -> None:
        self.rank, self.count, self.board = rank, len(board.places), board

    def share(self, own: Any) -> list[Any]:
        self.board.places[self.rank] = own
        try:
            self.board.barrier.wait(60)
            everything = list(self.board.places)
            self.board.barrier.wait(60)
        except threading.BrokenBarrierError:
            raise Stopped("another thread is gone") from None
        return everything


def quantized(recipe: Recipe, processes: Processes | None = None, folder: Path | None = None, stream: bool = False, progress=None) -> Quantized:
    model = copy.deepcopy(tiny_decoder(layers=3)).double()  # sums in another order differ in digits that decide no code
    guest = processes is not None and processes.rank > 0
    if processes is not None and guest:
        processes.share(None)
    journal = Journal(folder, {}, guest=guest) if folder is not None else None
    if processes is not None and not guest:
        processes.share(None)
    try:
        return quantize_model(
            load_in_memory(model),
            recipe,
            BATCHES,
            registry=Registry(""),
            adapter=TinyDecoderAdapter(),
            processes=processes,
            journal=journal,
            stream=stream,
            progress=progress,
        )
    finally:
        if journal is not None:
            journal.close()


def together(count: int, recipe: Recipe, folder: Path | None = None, stream: bool = False, dies: int | None = None) -> list[Any]:
    """What each of `count` threads returns or raises.  dies: a rank that stops before its third block; the first is finished by then"""
    board, results = Board(count), [None] * count

    def work(rank: int) -> None:
        def progress(phase: str, done: int, total: int) -> None:
            if rank == dies and (phase, done) == ("block", 2):
                raise ZeroDivisionError

        torch.set_grad_enabled(False)
        try:
            results[rank] = quantized(recipe, Thread(rank, board), folder, stream, progress)
        except Exception as e:
            results[rank] = e
            board.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def tensors(q: Quantized) -> dict[str, torch.Tensor]:
    if q.values is None:
        return dict(q.model.state_dict())
    return {name: q.values[name] for name in q.values.names()}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_each_of_several_processes_holds_what_one_alone_finds(name, count):
    alone = tensors(quantized(RECIPES[name]))
    for q in together(count, RECIPES[name]):
        assert not isinstance(q, Exception), q
        own = tensors(q)
        assert own.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(own[key], value, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_processes_that_stream_share_one_journal_and_resume_after_one_was_lost(tmp_path):
    recipe = RECIPES["gptq"]
    whole = tensors(quantized(recipe))
    first, second = together(2, recipe, tmp_path / "run", stream=True, dies=1)
    assert isinstance(first, Stopped) and isinstance(second, ZeroDivisionError)
    done = len(list((tmp_path / "run").glob("block-*.json")))
    assert done in (1, 2)  # the other was hit while it wrote the second, or after
    assert {p.name for p in (tmp_path / "run").glob(f"inputs-{done:05}-*")} == {f"inputs-{done:05}-{b:05}.safetensors" for b in range(5)}
    again = together(2, recipe, tmp_path / "run", stream=True)
    own = tensors(again[0])
    for key, value in whole.items():
        torch.testing.assert_close(own[key], value, rtol=1e-12, atol=1e-12)


def test_work_is_shared_out_by_cost():
    assert shared_out([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert shared_out([10, 1, 1, 1, 9], 2) == [0, 1, 0, 1, 1]
    costs = [float(i % 7 + 1) for i in range(40)]
    who = shared_out(costs, 3)
    loads = [sum(c for c, w in zip(costs, who, strict=True) if w == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= max(costs)


def test_fewer_batches_than_processes_is_refused():
    class Third(Alone):
        rank, count = 2, 8

    with pytest.raises(CalibrationError, match=r"8 processes share 5 calibration batches.*calibration.batch=1"):
        quantized(RECIPES["gptq"], Third())


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with of_this_run() as processes:
        assert (processes.rank, processes.count, processes.share(3), processes.own([1, 2]), processes.agreed("x")) == (0, 1, [3], [1, 2], "x")


GLOO = """
import os, sys
from qcore.errors import Stopped
from qcore.processes import of_this_run
import torch

with of_this_run() as processes:
    print(processes.share({"rank": processes.rank, "t": torch.arange(3) * processes.rank}), processes.agreed(processes.rank), flush=True)
    if processes.rank == 1:
        os._exit(9)
    try:
        processes.share(None)
    except Stopped as e:
        print("stopped:", e, flush=True)
"""


def test_gloo_shares_in_the_order_of_ranks_and_says_when_one_is_gone(tmp_path):
    (tmp_path / "work.py").write_text(GLOO)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, str(tmp_path / "work.py")], env=env | {"RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    (out, err), (other, _) = both[0].communicate(timeout=120), both[1].communicate(timeout=120)
    shared = "[{'rank': 0, 't': tensor([0, 0, 0])}, {'rank': 1, 't': tensor([0, 1, 2])}] 0"
    first, second = out.decode().splitlines()
    assert first == other.decode().strip() == shared, err.decode()
    assert second.startswith("stopped: process 0 of 2 lost the others: one of them ended")
    assert both[1].returncode == 9
