"""A block that is called alone does what it does in a whole pass, to the last bit; where it would not, it is run by whole passes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from qcore.calibration.entries import Entries
from qcore.model import Topology
from qcore.model.tap import RunContext, run_context, running
from qcore.numbers import int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import GPTQ
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from torch import Tensor, nn

BATCHES = [torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


class Block(nn.Module):
    """y = x + tanh(W x); counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        self.runs += 1
        return x + torch.tanh(self.linear(x))


class Chain(nn.Module):
    """Blocks one after the other, with something of the model's own between them."""

    def __init__(self, n: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(n))
        self.between = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(self.between(x))
        return x


class Skip(Chain):
    """The fourth block reads what the first put out."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x + outputs[0] if i == 3 else x)
            outputs.append(x)
        return x


class Told(Chain):
    """What the model leaves on a block is read between blocks."""

    def forward(self, x: Tensor) -> Tensor:
        self.blocks[2].said = x.mean()  # type: ignore[assignment]
        for i, block in enumerate(self.blocks):
            x = block(x) if i != 2 else block(x) * self.blocks[2].said  # type: ignore[operator]
        return x


class Reader(Block):
    said: Tensor

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x) * self.said


class ToldInside(Chain):
    """What the model leaves on a block is read by the block, and no argument tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = Reader()

    def forward(self, x: Tensor) -> Tensor:
        self.blocks[2].said = x.mean()  # type: ignore[assignment]
        return super().forward(x)


class Looks(Chain):
    """Between blocks, a value of the first block's output is an index."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        row = int(first.abs().sum()) % 2
        x = self.blocks[1](first)
        for block in self.blocks[2:]:
            x = block(x + x[row])
        return x


class Writes(Block):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x.mul_(1.5))


class WritesInside(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = Writes()


class Contexts(Chain):
    """A hook of the model's says in the run context what the batch is about, and blocks read it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[3] = Weighted()

    def forward(self, x: Tensor) -> Tensor:
        with running(replace(run_context(), weight=float(x.mean()))):
            return super().forward(x)


class Weighted(Block):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x) * run_context().weight


def walk(model: nn.Module) -> Entries:
    """Go through all blocks as a run does, changing each when it is done; what is called alone must be what a whole pass would call."""
    paths = [name for name, m in model.named_modules() if isinstance(m, Block)]

    def run(batch: int) -> None:
        with running(RunContext()):
            model(BATCHES[batch].clone())

    entries = Entries(model, paths, run, len(BATCHES))
    for index, path in enumerate(paths):
        entries.enter(index)
        for batch in range(len(BATCHES)):
            call = entries.of(index, batch)
            if call is None:
                continue
            with torch.no_grad():
                wanted, output = entries._whole(index, batch, through=True)
                assert wanted is not None and torch.equal(call.args[0], wanted.args[0])
                assert torch.equal(call.call(model.get_submodule(path)), output)
        with torch.no_grad():
            model.get_submodule(path).linear.weight.mul_(0.9)  # type: ignore[union-attr, operator]
    assert [m for m in model.modules() if isinstance(m, Block)] == [model.get_submodule(p) for p in paths]
    return entries


@pytest.mark.parametrize(
    ("model", "whole"),
    [(Chain, []), (Skip, ["blocks.3"]), (Told, []), (ToldInside, ["blocks.2"]), (Looks, []), (WritesInside, ["blocks.2"]), (Contexts, [])],
)
def test_blocks_are_called_alone_but_where_that_would_change_a_bit(model, whole):
    assert [path for path, alone in walk(model()).alone.items() if not alone] == whole


def test_work_grows_with_the_number_of_blocks_but_for_the_two_batches_that_prove_it():
    runs = []
    for n in (4, 8):
        model = Chain(n)
        batches = [torch.randn(2, 4) for _ in range(50)]
        entries = Entries(model, [f"blocks.{i}" for i in range(n)], lambda b, m=model, x=batches: m(x[b]), 50)
        for i in range(n):
            entries.enter(i)
        runs.append(sum(b.runs for b in model.blocks))
    # once for what the next block reads, and for two batches n²/2 times
    assert runs == [3 * 50 + 2 * (10 + 4), 7 * 50 + 2 * (36 + 8)]


def test_a_block_that_is_not_reached_is_left_to_its_observers():
    model = Chain(3)
    entries = Entries(model, ["blocks.0", "blocks.2"], lambda b: model.blocks[0](BATCHES[b]), 3)
    entries.enter(1)
    assert entries.of(1, 0) is None and entries.alone == {"blocks.2": False}


class Rerun(TinyDecoderAdapter):
    def topology(self, model: nn.Module) -> Topology:
        own = super().topology(model)
        return replace(own, blocks=tuple(replace(b, feed="rerun") for b in own.blocks))


@pytest.mark.parametrize("propagate", ["weights", "all"])
def test_codes_are_those_of_whole_passes(propagate, monkeypatch):
    batches = [tokens(seed=seed) for seed in range(3)]
    recipe = Recipe(rules=(Rule("*:weight", int_weight(4, 8)),), solver=GPTQ(), propagate=propagate)

    def codes() -> list[Tensor]:
        result = quantize_model(load_in_memory(tiny_decoder()), recipe, batches, registry=Registry(""), adapter=Rerun())
        return [t for t in result.model.state_dict().values() if t.dtype in (torch.int8, torch.uint8, torch.int32)]

    alone = codes()
    entered: list[int] = []
    monkeypatch.setattr(Entries, "enter", lambda self, index: entered.append(index))
    whole = codes()
    assert len(alone) == len(whole) > 4 and len(entered) > 1
    assert all(torch.equal(a, b) for a, b in zip(alone, whole, strict=True))
