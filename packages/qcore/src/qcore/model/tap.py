"""Taps: where a method looks into a module, or quantizes there.

An attention or experts function, or an adapter's own mixer, calls `tap(module, "q", q)`.  Nothing happens unless a handler was attached to that
module; handlers are modules in `module.taps`, so what a checkpoint keeps is saved, loaded and copied with the model, and no global state exists.
The inputs and outputs of modules are tapped with torch's own hooks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class RunContext:
    """What one forward pass is about, beside its tensors; None = nothing special.

    valid:     [B, T] bool, the rows that are no padding
    segments:  [B, T] int, the modality of each row
    positions: [B, T] int, the place of each row in its sequence
    weight:    importance of every row of this pass; 1 = as any other
    """

    valid: Tensor | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None
    weight: float = 1.0


_NOTHING_SPECIAL = RunContext()
_RUNNING: ContextVar[RunContext | None] = ContextVar("qcore_run_context", default=None)


@contextmanager
def running(context: RunContext) -> Iterator[None]:
    """Make `context` the one that taps and hooks see inside the block."""
    token = _RUNNING.set(context)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def run_context() -> RunContext:
    """The context of the forward pass that is running."""
    return _RUNNING.get() or _NOTHING_SPECIAL


class Tap(nn.Module):
    """Handles one tapped tensor: observes it, or returns another in its place.  Subclasses override `forward`."""

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return x


class TapChain(Tap):
    """Several handlers at one place, in the order in which they came."""

    def __init__(self) -> None:
        super().__init__()
        self.handlers = nn.ModuleList()

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        for handler in self.handlers:
            x = handler(x, rows, weight)
        return x


def tap(module: nn.Module, tensor: str, x: Tensor, *, rows: Tensor | None = None, weight: Tensor | None = None, part: int | None = None) -> Tensor:
    """Let whatever is attached at (module, tensor, part) see `x`; returns `x`, or what stands in its place.

    rows:   indices of the token rows that `x` holds, where they were gathered (experts)
    weight: [T] importance of each row, such as the router's affinity
    """
    taps = module._modules.get("taps")
    if taps is None:
        return x
    key = tap_key(tensor, part)
    return taps[key](x, rows, weight) if key in taps else x  # type: ignore[operator,index]


def tap_key(tensor: str, part: int | None) -> str:
    """The name of a place in `module.taps`; a ModuleDict takes no dots."""
    return tensor.replace(".", "/") + ("" if part is None else f"@{part}")


def attach(module: nn.Module, tensor: str, handler: Tap, part: int | None = None) -> None:
    """Attach a handler in place, after those that are there."""
    if "taps" not in module._modules:
        module.add_module("taps", nn.ModuleDict())
    taps = module._modules["taps"]
    assert isinstance(taps, nn.ModuleDict)
    key = tap_key(tensor, part)
    if key not in taps:
        taps[key] = TapChain()
    taps[key].handlers.append(handler)  # type: ignore[union-attr,operator]


def detach(module: nn.Module, tensor: str, handler: Tap, part: int | None = None) -> None:
    """Take a handler away in place, and the places that it leaves empty."""
    taps = module._modules["taps"]
    assert isinstance(taps, nn.ModuleDict)
    key = tap_key(tensor, part)
    chain = taps[key]
    chain.handlers = nn.ModuleList(h for h in chain.handlers if h is not handler)  # type: ignore[union-attr]
    if not len(chain.handlers):
        del taps[key]
    if not len(taps):
        del module._modules["taps"]
