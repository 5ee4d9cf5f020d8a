"""Attention-invariant flexible switching: once, before the first layer, all visual tokens go to the front, so that each modality is one block of
rows.

Attention does not mind an order of tokens if everything that knows about places goes along: positions (RoPE, M-RoPE) travel with their tokens, and
token i may attend to j if j stood before i, Attn'(PX) = P·Attn(X).  Padding stays where it is, so a mask of padding needs no change, here and when
later tokens are decoded; keys and values lie in the cache in the new order, tokens that are decoded are appended and see everything.  What the
language model puts out goes back to the old order, so nothing outside it notices.

Source: https://arxiv.org/abs/2502.00425 (MQuant), section 3.2.  In the code released with it `--aifs` is parsed and never used.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.tap import RunContext, Tap, run_context
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Insert, ModuleConfig, Rewrite
from torch import Tensor, nn

from qplug_multimodal.anatomy import find_anatomy
from qplug_multimodal.modality import TEXT, enter, leave

TAP = "order"
_ORDERS: ContextVar[tuple[Tensor | None, ...]] = ContextVar("qplug_multimodal_orders", default=())
_NO_MASK = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class VisualFirst(Tap):
    """The policy at the tap "order" of a language model: visual tokens first, in their own order, then the others in theirs."""

    name: ClassVar[str] = "visual-first"

    def order(self, segments: Tensor, valid: Tensor) -> Tensor:
        """Which token stands at each place, [B, T]: order[b, new] = old.  Padding keeps its place.

        segments: [B, T], 0 = text;  valid: [B, T] bool
        """
        key = torch.where(segments == TEXT, 1, 0)
        ranked = torch.where(valid, key, 2).argsort(dim=1, stable=True)  # valid ones in their new order, then padding
        places = (~valid).long().argsort(dim=1, stable=True)  # places of valid ones, then of padding
        return torch.empty_like(ranked).scatter_(1, places, ranked)

    @staticmethod
    def mask(order: Tensor, valid: Tensor, past: Tensor) -> Tensor:
        """Who may attend to whom: what is cached, and new tokens that stood before oneself.  [B, 1, T, P + T] bool

        order, valid: [B, T];  past: [B, P] bool, what in the cache is no padding
        A row of padding attends to itself, so that it is a number; nobody attends to it.
        """
        seen = order.unsqueeze(1) <= order.unsqueeze(2)  # [B, new i, new j]
        seen = seen & valid.unsqueeze(1) | torch.eye(order.shape[1], dtype=torch.bool, device=order.device)
        return torch.cat([past.unsqueeze(1).expand(-1, order.shape[1], -1), seen], 2).unsqueeze(1)

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls()


@dataclass(frozen=True)
class AIFS(Transform):
    """Attach `VisualFirst` to the language model.  It changes no number; per-modality scales then lie on two blocks of rows."""

    name: ClassVar[str] = "aifs"
    scope: ClassVar[Literal["block", "model"]] = "model"

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        language = find_anatomy(model).language.path
        require_plain_causal(model.get_submodule(language))
        return Rewrite(inserts={language: Insert(ModuleConfig(VisualFirst.name), f"tap:{TAP}")})


def policy_of(language: nn.Module) -> VisualFirst | None:
    """The order that is attached, or None."""
    taps = language._modules.get("taps")
    if taps is None or TAP not in taps:  # type: ignore[operator]
        return None
    return next((h for h in taps[TAP].handlers if isinstance(h, VisualFirst)), None)  # type: ignore[index]


def require_plain_causal(language: nn.Module) -> None:
    """SpecError for a language model whose attention is not plainly causal: windows and blocks are cut by places, which an order changes."""
    config: Any = language.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise SpecError(
            f"an order of tokens needs attention that is causal and nothing else, this model has {', '.join(sorted(kinds))}; leave AIFS out"
        )
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        raise SpecError("an order of tokens needs causal attention, this model attends in both directions; leave AIFS out")


@dataclass(frozen=True)
class InOrder:
    """Before the language model: put everything that belongs to tokens into the order of the policy, where there is one."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        policy, context = policy_of(module), run_context()
        order = None
        try:
            if policy is not None:
                order, kwargs, context = _ordered(policy, module, args, kwargs, context)
        finally:
            # the hook behind the model is called after an error too, and takes both away
            _ORDERS.set((*_ORDERS.get(), order))
            enter(context)
        return None if order is None else (args, kwargs)


@dataclass(frozen=True)
class OutOfOrder:
    """Behind the language model: give every token its old place back."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        leave()
        *rest, order = _ORDERS.get()
        _ORDERS.set(tuple(rest))
        if order is None or output is None:
            return None
        back = order.argsort(1)
        output.last_hidden_state = gather(output.last_hidden_state, back)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(gather(h, back) for h in output.hidden_states)
        return output


def gather(x: Tensor, order: Tensor) -> Tensor:
    """x [B, T, …] → x[b, order[b, t]]."""
    return x.gather(1, order.reshape(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def _ordered(
    policy: VisualFirst, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], context: RunContext
) -> tuple[Tensor | None, dict[str, Any], RunContext]:
    hidden = kwargs.get("inputs_embeds")
    if args or not isinstance(hidden, Tensor):
        raise SpecError("a language model with an order of tokens takes inputs_embeds by name, as the vision-language model hands them to it")
    b, t = hidden.shape[:2]
    segments = context.segments
    if segments is None or tuple(segments.shape) != (b, t):
        found = "nobody said" if segments is None else f"known for {tuple(segments.shape)} tokens of {(b, t)}"
        raise SpecError(f"which tokens are visual is {found}; pass input_ids to the whole model, or run it inside running(RunContext(segments=…))")
    given = kwargs.get("attention_mask")
    if isinstance(given, dict) or (isinstance(given, Tensor) and given.ndim != 2):
        raise SpecError("a model with an order of tokens makes its mask itself; pass the attention mask as [B, tokens] (and no compiled cache)")
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    seen = torch.ones(b, past + t, dtype=torch.bool, device=hidden.device) if given is None else given.bool()
    valid = seen[:, past:]
    order = policy.order(segments.to(hidden.device), valid)
    if bool((order == torch.arange(t, device=order.device)).all()):
        return None, kwargs, context
    if kwargs.get("output_attentions"):
        raise SpecError("attention maps of a model with an order of tokens are in that order; leave output_attentions out")
    _require_known(kwargs, (b, t))
    mask = policy.mask(order, valid, seen[:, :past])
    implementation = getattr(module.config, "_attn_implementation", None) or "eager"
    if implementation in _NO_MASK:
        raise SpecError(f"attention {implementation!r} takes no mask of its own shape; use sdpa for a model with an order of tokens")
    if implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + t, device=hidden.device)
    positions = positions.expand(*positions.shape[:-2], b, t)
    moved = {
        "inputs_embeds": gather(hidden, order),
        "position_ids": positions.gather(-1, order.expand(positions.shape)),
        "attention_mask": mask,
    }
    context = replace(
        context,
        segments=segments.gather(1, order),
        valid=None if context.valid is None else context.valid.gather(1, order),
        positions=None if context.positions is None else context.positions.gather(1, order),
    )
    return order, kwargs | moved, context


_KNOWN = frozenset(("inputs_embeds", "position_ids", "attention_mask", "past_key_values", "cache_position"))


def _require_known(kwargs: Mapping[str, Any], tokens: tuple[int, int]) -> None:
    """SpecError for an argument that has something for every token, and that nobody taught to travel."""
    for name, value in kwargs.items():
        if name not in _KNOWN and isinstance(value, Tensor) and tokens[1] in value.shape and tokens[1] > 1:
            raise SpecError(f"argument {name!r} {tuple(value.shape)} of the language model may belong to tokens, and does not follow their order")
