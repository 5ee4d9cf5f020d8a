"""What blocks are called with where the model cannot be fed block by block: so it is run from the start once for a block, not for each stage of it.

A model is "rerun" because what lies between its blocks is its own affair: a connector, a residual that skips blocks, the first block's values.  That
code is run as it stands.  The block before gives back what it put out; those before it give back NaN of the shapes that they had, which costs nothing
and cannot pass for a value.  Whether a block that is called so does what it does in the model is not assumed: for the first batch and the last, what
it is called with, its context and its output are compared bit by bit with those of a whole pass.  Where they differ (a block that reads what blocks
long before it put out, or what another module left somewhere), that block is run by whole passes.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcore.model.tap import RunContext, run_context, running


class StopForward(Exception):
    """Ends a forward pass whose rest nobody needs."""


@dataclass
class BlockInput:
    """What one batch brings to a block: its arguments, and the run context of the whole pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: RunContext

    @property
    def hidden(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def with_hidden(self, hidden: Tensor) -> "BlockInput":
        if self.args:
            return BlockInput((hidden, *self.args[1:]), self.kwargs, self.context)
        return BlockInput((), {**self.kwargs, "hidden_states": hidden}, self.context)

    def call(self, module: nn.Module) -> Any:
        """Run a block on it."""
        with running(self.context):
            return module(*self.args, **self.kwargs)


class Entries:
    """The entries of one block after the other.

    model:  blocks before the one that is asked for are as they will stay
    paths:  of the blocks, in order of execution
    run:    one pass of the model on one batch, in its context
    count:  of batches
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], run: Callable[[int], None], count: int) -> None:
        self.model, self.paths, self._run, self.count = model, tuple(paths), run, count
        self._index = -1
        self._calls: list[BlockInput] = []  # [batch], of block `_index`; [] = it is run by whole passes
        self._versions: list[list[int]] = []
        self._like: list[list[Any]] = [[] for _ in range(count)]  # [batch][block], what finished blocks put out, every number NaN
        self.alone: dict[str, bool] = {}  # path → whether the block is called alone; for tests and for who wonders

    def of(self, index: int, batch: int) -> BlockInput | None:
        """What block `index` is called with on a batch; None where only a whole pass will do, or nobody asked to `enter` it."""
        if index != self._index or not self._calls:
            return None
        if versions(self._calls[batch]) != self._versions[batch]:  # the block, or who watches it, writes into what it is given
            self._calls, self.alone[self.paths[index]] = [], False
            return None
        return self._calls[batch]

    @torch.no_grad()
    def enter(self, index: int) -> None:
        """Find what block `index` is called with, if that is not known; it must be there, and nobody watch it, for it is run."""
        if index == self._index:
            return
        previous = self._calls if index == self._index + 1 else []
        self._calls, self._index = [], index
        calls = list[BlockInput]()
        for batch in range(self.count):
            call = (self._after(index, batch, previous[batch]) if previous else None) or self._whole(index, batch)[0]
            if call is None:
                break  # it is not reached, which its observers say better
            calls.append(call)
        alone = len(calls) == self.count and self._proven(index, calls)
        self.alone[self.paths[index]] = alone
        if alone:
            self._calls, self._versions = calls, [versions(c) for c in calls]

    def _after(self, index: int, batch: int, call: BlockInput) -> BlockInput | None:
        """The entry of a block by the output of the one before; None where the model does not come so far without the others."""
        output = call.call(self.model.get_submodule(self.paths[index - 1]))
        # contiguous ones of their own for the pass: a model may look at them from another side, or write into them
        outputs = [*(_mapped(o, lambda t: t.clone(memory_format=torch.contiguous_format)) for o in self._like[batch]), output]
        self._like[batch].append(_mapped(output, _nan))
        originals = [self.model.get_submodule(path) for path in self.paths[:index]]
        for path, original, own in zip(self.paths, originals, outputs, strict=False):
            self.model.set_submodule(path, _GivesBack(original, own))
        try:
            return self._pass(index, batch)[0]
        except Exception:
            # NaN where the model looks at values, such as an index: a whole pass tells whether it was that
            return None
        finally:
            for path, original in zip(self.paths, originals, strict=False):
                self.model.set_submodule(path, original)

    def _whole(self, index: int, batch: int, through: bool = False) -> tuple[BlockInput | None, Any]:
        """What a whole pass brings to the block, and what the block puts out, if asked to go `through` it."""
        like = self._like[batch] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            like.append(_mapped(output, _nan))

        handles = [self.model.get_submodule(path).register_forward_hook(note) for path in self.paths[:index]]
        try:
            return self._pass(index, batch, through)
        finally:
            for handle in handles:
                handle.remove()

    def _pass(self, index: int, batch: int, through: bool = False) -> tuple[BlockInput | None, Any]:
        calls: list[BlockInput] = []
        outputs: list[Any] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(_mapped(BlockInput(args, kwargs, run_context()), Tensor.detach))
            if not through:
                raise StopForward

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            raise StopForward

        module = self.model.get_submodule(self.paths[index])
        handles = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
        try:
            with suppress(StopForward):
                self._run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return (calls[0] if calls else None), (outputs[0] if outputs else None)

    def _proven(self, index: int, calls: Sequence[BlockInput]) -> bool:
        """Whether calling the block so is what whole passes do, to the last bit; for the first batch and the last."""
        ends = sorted({0, self.count - 1})
        # all whole passes first: what one leaves in a module must not pass for an argument of the other
        wanted = [self._whole(index, batch, through=True) for batch in ends]
        block = self.model.get_submodule(self.paths[index])
        for batch, (call, output) in zip(ends, wanted, strict=True):
            before = versions(calls[batch])
            if not (_same(calls[batch], call) and _same(calls[batch].call(block), output) and before == versions(calls[batch])):
                return False
        return True


class _GivesBack(nn.Module):
    """Stands in for a block; what else the model asks of it, the block answers."""

    def __init__(self, original: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["original"], self.output = original, output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


def _nan(like: Tensor) -> Tensor:
    """NaN of that shape, dtype and device, and zeros where the dtype has none, in the memory of one number."""
    return torch.full((), torch.nan if like.is_floating_point() else 0, dtype=like.dtype, device=like.device).expand(like.shape)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, BlockInput):
        return replace(value, args=_mapped(value.args, change), kwargs=_mapped(value.kwargs, change))
    if type(value) in (tuple, list):
        return type(value)(_mapped(v, change) for v in value)
    if type(value) is dict:
        return {k: _mapped(v, change) for k, v in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two structures are equal to the last bit; of objects that may hold anything nobody knows, so they are not."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, BlockInput | RunContext):
        return _same(vars(a), vars(b))
    return isinstance(a, bool | int | float | str | torch.dtype | torch.device | None) and a == b


def versions(value: Any) -> list[int]:
    """How often each tensor of a structure was written into."""
    if isinstance(value, Tensor):
        return [value._version]
    if isinstance(value, BlockInput):
        return versions((value.args, value.kwargs))
    if isinstance(value, dict):
        return versions(tuple(value.values()))
    return [v for own in value for v in versions(own)] if isinstance(value, tuple | list) else []
