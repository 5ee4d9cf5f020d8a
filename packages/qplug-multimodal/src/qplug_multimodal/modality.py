"""While a vision-language model runs: which token is visual, and in what order the language model sees the tokens.

Three hooks, put in place by the adapter's `prepare`, so that they are there in a quantized model that is loaded again too:
at the model: ids of images are visual tokens, all others text (`RunContext.segments`: 0 text, 1 visual); tokens that are generated are text;
at the tower: rows there are patches, not tokens, so padding and modalities of tokens are taken away from the context;
at the language model: where an order of tokens is attached at its tap "order", tokens, positions, mask and context go through it (`aifs.py`).
"""

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from qcore.model.tap import RunContext, run_context, running
from torch import Tensor, nn

from qplug_multimodal.anatomy import Anatomy

TEXT, VISUAL = 0, 1

# contexts that were entered, by hooks of modules that are running: the last one belongs to the innermost module
_ENTERED: ContextVar[tuple[Any, ...]] = ContextVar("qplug_multimodal_entered", default=())


def watch_modalities(model: nn.Module, anatomy: Anatomy) -> None:
    """Put the hooks in place; a second call changes nothing."""
    from qplug_multimodal.aifs import InOrder, OutOfOrder

    for path, before, after in (
        ("", NameTokens(anatomy.images), Leave()),
        (anatomy.vision.path, ForgetTokens(), Leave()),
        (anatomy.language.path, InOrder(), OutOfOrder()),
    ):
        module = model.get_submodule(path)
        if not any(type(hook) is type(before) for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after, with_kwargs=True, always_call=True)


def enter(context: RunContext) -> None:
    """Make `context` the running one until the matching `leave`."""
    manager = running(context)
    manager.__enter__()
    _ENTERED.set((*_ENTERED.get(), manager))


def leave() -> None:
    """Go back to the context before the last `enter`."""
    *rest, manager = _ENTERED.get()
    _ENTERED.set(tuple(rest))
    manager.__exit__(None, None, None)


@dataclass(frozen=True)
class NameTokens:
    """At the model: enter a context that says which tokens are visual.  images: ids that stand for a visual token"""

    images: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = run_context()
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            context = replace(context, segments=torch.isin(ids, torch.tensor(self.images, device=ids.device)).long())
        elif isinstance(types := kwargs.get("mm_token_type_ids"), Tensor):
            context = replace(context, segments=(types != 0).long())
        enter(context)


@dataclass(frozen=True)
class ForgetTokens:
    """At the tower: what the context says of tokens does not hold for patches."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter(RunContext(weight=run_context().weight))


@dataclass(frozen=True)
class Leave:
    """Behind either of them, whether or not the pass came to its end."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        leave()
