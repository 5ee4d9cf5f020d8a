"""Which modules the loss comes from: one of them is float again at a time, and the divergence is measured anew.

Substitution sees what an error of a layer's own output does not: an error that later layers amplify, and one that nobody reads.  What the modules
save does not add up to the whole divergence, because their errors meet; so the divergence with all of them float at once is measured too.  It should
be about zero, and tells how much of the loss is no module's that could be put back.

A model that was rewritten before it was quantized (rotated, smoothed) has other float weights than its source.  They are made again from the source
and the `Rewrite`, which a checkpoint keeps beside the weights; without it, substitution would put a weight into channels that are no more.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcore.calibration.runner import BlockFeed
from qcore.errors import QcoreError
from qcore.evaluation.kinds import kind_of
from qcore.evaluation.store import Reference
from qcore.evaluation.task import Batch, Progress, Task
from qcore.model.adapter import ModelAdapter, tied_names
from qcore.model.reader import TensorReader, materialize
from qcore.model.tap import Tap, TapChain
from qcore.model.topology import Block, within
from qcore.modules.online import Online
from qcore.modules.stored import StoredWeight
from qcore.transforms.apply import place_inserts
from qcore.transforms.rewrite import Rewrite, RewrittenReader


@dataclass(frozen=True)
class ModuleCost:
    """What one module costs.

    kl:    divergence from the float model when this module alone is float again, its inputs too
    saved: how much less that is than with all modules quantized; negative where the module's error made up for another's
    """

    module: str
    kind: str
    kl: float
    saved: float


@dataclass(frozen=True)
class Attribution:
    """The divergence of a quantized model, by module.

    kl:       with every module quantized;  kl_float: with all of `modules` float again
    rows:     on how many outputs it was measured
    modules:  the one that costs most first
    """

    kl: float
    kl_float: float
    rows: int
    modules: tuple[ModuleCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kl": self.kl, "kl_float": self.kl_float, "rows": self.rows, "modules": [cost.__dict__ for cost in self.modules]}


class FloatAgain:
    """Lets modules of a quantized model be float again, and back.

    model:    the quantized model, with values
    skeleton: its float architecture as a source makes it; its parameters may be on meta, and it is prepared in place
    reader:   the float weights
    rewrite:  what was done to them before they were quantized
    modules:  classes of run-time modules by name
    dtype:    in which `model` computes
    """

    def __init__(
        self,
        model: nn.Module,
        skeleton: nn.Module,
        reader: TensorReader,
        adapter: ModelAdapter,
        rewrite: Rewrite | None = None,
        modules: Mapping[str, type[Any]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rewrite = rewrite or Rewrite()
        adapter.prepare(skeleton)
        self.model, self.adapter, self.dtype = model, adapter, dtype
        self.blocks = adapter.topology(skeleton).blocks
        self._float = copy.deepcopy(skeleton)
        place_inserts(self._float, rewrite, modules)
        ties = {name: first for name, first in tied_names(skeleton).items() if name not in rewrite.unties}
        self._reader = _WithTies(RewrittenReader(reader, rewrite, skeleton), ties)

    def units(self) -> tuple[str, ...]:
        """Paths of what is float or quantized as one: leaves, fused parameters, handlers of taps; in the model's own order."""
        modules, parameters = dict(self._float.named_modules()), dict(self._float.named_parameters(remove_duplicate=False))
        found: dict[str, None] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, StoredWeight):
                found.setdefault(next((p for p in _upwards(path) if p in modules or p in parameters), ""))
            elif isinstance(module, Tap) and not isinstance(module, TapChain) and path not in modules:
                found.setdefault(path)
        found.pop("", None)
        return tuple(found)

    @contextmanager
    def substituted(self, *paths: str) -> Iterator[None]:
        """The modules at `paths` are float inside."""
        with ExitStack() as stack:
            for path in paths:
                stack.callback(self._put(path, self._make(path)))
            yield

    def _make(self, path: str) -> nn.Module | nn.Parameter:
        if path in dict(self._float.named_parameters(remove_duplicate=False)):
            return nn.Parameter(self._reader[path].to(self.dtype), requires_grad=False)
        try:
            module = copy.deepcopy(self._float.get_submodule(path))
        except AttributeError:
            return Tap()  # a handler that passes its tensor on
        leaf = module.leaf if isinstance(module, Online) else module
        materialize(leaf, path, self._reader, self.dtype)
        if left := [n for n, p in module.named_parameters() if p.is_meta]:
            raise QcoreError(f"{path}: the float model has no values for {left[0]!r}, so it cannot be float again")
        return module.eval()

    def _put(self, path: str, value: nn.Module | nn.Parameter) -> Callable[[], None]:
        """Put it in place, also where the same module stands a second time; returns how to undo it."""
        old = self.model.get_submodule(path)
        places = [p for p, m in self.model.named_modules(remove_duplicate=False) if m is old]

        def swap(new: nn.Module | nn.Parameter) -> None:
            for place in places:
                parent, _, own = place.rpartition(".")
                owner = self.model.get_submodule(parent)
                owner._modules.pop(own, None) if isinstance(new, nn.Parameter) else owner._parameters.pop(own, None)
                (owner._parameters if isinstance(new, nn.Parameter) else owner._modules)[own] = new  # type: ignore[assignment]

        swap(value)
        return partial(swap, old)


@torch.no_grad()
def attribute(again: FloatAgain, task: Task, reference: Reference, progress: Progress | None = None) -> Attribution:
    """Measure what every module costs: one evaluation of `task` for each, from its block on.

    The blocks before it are not run again: what they put out is kept.  QcoreError for a task whose scores have no "kl".
    """
    units = again.units()
    forward = _FromBlock(again.model, again.adapter, again.blocks)
    whole = partial(again.adapter.outputs, again.model)
    scores = task.evaluate(whole, reference)
    if "kl" not in scores:
        raise QcoreError(f"task {task.name!r} gives no KL divergence, so a loss cannot be attributed by it; it gives {', '.join(scores)}")
    before = scores["kl"]
    costs: list[ModuleCost] = []

    def measure(path: str, run: Any) -> None:
        if progress is not None:
            progress("attribute", len(costs), len(units))
        with again.substituted(path):
            kl = task.evaluate(run, reference)["kl"]
        costs.append(ModuleCost(path, kind_of(path), kl, before - kl))

    blocks = again.blocks if forward.resumes else ()
    for block in blocks:
        for path in units:
            if within(path, block.module):
                measure(path, forward)
        forward.step()
    for path in units:
        if not any(within(path, block.module) for block in blocks):
            measure(path, whole)
    with again.substituted(*units):
        after = task.evaluate(whole, reference)["kl"]
    if progress is not None:
        progress("attribute", len(units), len(units))
    return Attribution(before, after, reference.rows, tuple(sorted(costs, key=lambda c: (-c.saved, c.module))))


class _FromBlock:
    """Batches → outputs, from the block that is looked at on: what the blocks before it put out is kept."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter, blocks: Sequence[Block]) -> None:
        self._model, self._adapter, self._blocks = model, adapter, tuple(blocks)
        self.resumes = bool(blocks) and all(b.feed == "previous" for b in blocks)
        self._feed: BlockFeed | None = None
        self._kept: Sequence[Tensor] = []
        self._index = 0

    def __call__(self, batch: Batch) -> Tensor:
        raise AssertionError("a task asks for all batches at once")

    def each(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """The outputs of every batch; the batches are the same every time."""
        if self._feed is None:
            self._feed = BlockFeed(self._model, self._adapter, self._blocks, list(batches))
            self._feed.start(lambda block, call: self._model.get_submodule(block.module)(*call.args, **call.kwargs))
            self._kept = [call.hidden for call in self._feed.inputs(0)]
        for index in range(self._index, len(self._blocks)):
            self._feed.advance(self._run(index))
        outputs = [self._feed.outputs(batch) for batch in range(len(self._feed.batches))]
        self._feed.advance(self._kept)
        yield from outputs

    def step(self) -> None:
        """The block at hand is done with: its outputs take the place of its inputs."""
        if self._feed is not None:
            self._kept = self._run(self._index)
            self._feed.advance(self._kept)
        self._index += 1

    def _run(self, index: int) -> list[Tensor]:
        assert self._feed is not None
        module = self._model.get_submodule(self._blocks[index].module)
        outputs = [self._feed.run(index, batch, module) for batch in range(len(self._feed.batches))]
        return [out[0] if isinstance(out, tuple) else out for out in outputs]


class _WithTies:
    """A reader that knows tied names by the one that is stored."""

    def __init__(self, reader: TensorReader, ties: Mapping[str, str]) -> None:
        self._reader, self._ties = reader, ties

    def names(self) -> Iterable[str]:
        return [*self._reader.names(), *self._ties]

    def __contains__(self, name: object) -> bool:
        return name in self._reader or (isinstance(name, str) and self._ties.get(name, "") in self._reader)

    def __getitem__(self, name: str) -> Tensor:
        return self._reader[name] if name in self._reader else self._reader[self._ties.get(name, name)]


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
