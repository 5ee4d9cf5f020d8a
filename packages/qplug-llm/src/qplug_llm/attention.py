"""The attention function "qcore": sdpa with taps.

One function, registered in transformers' `AttentionInterface`, sees q, k and v after the rotary embedding, the mask and the scaling of every family
that routes through it; so no model file is copied and no `forward` is patched.  The same name stands in `AttentionMaskInterface`: without it the
mask would come back None, and causality would hang on a default.

Tapped tensors are laid out by token, as the inputs of linear layers are: q, k, v as [B, T, H·D] (head by head), p as [B, T, H, S] with S keys.
Keys and values are tapped after the cache: while decoding, T of k and v is the whole past.  Where a policy for the cache (`KVCache`) sits at a tap,
it and the handlers before it work where tokens enter the cache (cache.py); without a cache, here, with the same result.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from qcore.model.tap import Tap, tap, tap_key
from qcore.modules.kv_cache import KVCache, KVStore, Recent, chain
from torch import Tensor, nn

NAME = "qcore"
_MARK = "qplug_llm_recent"

# (module, q, k, v, output), each of the first three [B, H, T, D], the output [B, T, H, D]
Watcher = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], None]
_WATCHER: ContextVar[Watcher | None] = ContextVar("qplug_llm_attention_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Show every attention that runs inside the block to `watcher`."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def register() -> None:
    """Make "qcore" a name that `set_attn_implementation` knows; safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def can_be_set(model: nn.Module) -> bool:
    """Whether the model's attention runs through transformers' AttentionInterface."""
    check = getattr(type(model), "_can_set_attn_implementation", None)
    return bool(check is not None and check())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as sdpa computes it, with q, k, v and the probabilities p tapped.

    query: [B, H, T, D]; key, value: [B, Hkv, S, D]; attention_mask: [B, 1, T, S] bool (True = attend) or additive, None = causal
    return: [B, T, H, D], and None
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    taps = module._modules.get("taps")
    recent: tuple[Recent | None, Recent | None] = (None, None)
    # sdpa has no logits' soft cap, no attention sinks, no probabilities to look at, and one key for all queries
    explicit = (taps is not None and tap_key("p", None) in taps) or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None  # type: ignore[operator]
    if taps is not None:
        query = _tapped(module, "q", query)
        if not explicit and attention_mask is None and (y := _from_codes(module, query, key, value, scaling)) is not None:
            return y, None
        key, recent_key = _remembered(module, "k", key, query.shape[2])
        value, recent_value = _remembered(module, "v", value, query.shape[2])
        recent = (recent_key, recent_value)
    if explicit or any(r is not None and r.exact.shape[2] for r in recent):
        out = _explicit(module, query, key, value, attention_mask, scaling, dropout, *recent, **kwargs)
    else:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if (watcher := _WATCHER.get()) is not None:
        watcher(module, query, key, value, out)
    return out, None


def _tapped(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Tap [B, H, T, D] as [B, T, H·D]."""
    heads = x.shape[1]
    return tap(module, name, x.transpose(1, 2).flatten(2)).unflatten(2, (heads, -1)).transpose(1, 2)


def handled(handlers: Sequence[Tap], x: Tensor) -> Tensor:
    """[B, H, T, D] through some handlers, which take [B, T, H·D]."""
    if not handlers:
        return x
    rows = x.transpose(1, 2).flatten(2)
    for handler in handlers:
        rows = handler(rows)
    return rows.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def mark(values: Tensor, recent: Recent) -> Tensor:
    """The same object, `values`, which now says that it comes out of a quantized cache."""
    setattr(values, _MARK, recent)
    return values


def _remembered(module: nn.Module, name: str, x: Tensor, queries: int) -> tuple[Tensor, Recent | None]:
    """Keys or values as a cache of the tap's policy gives them back; `x` came out of one already, or there is none."""
    before, policy, after = chain(module, name)
    if policy is None:
        return _tapped(module, name, x), None
    recent: Recent | None = getattr(x, _MARK, None)
    if recent is None:
        x, recent = KVStore(policy).append(handled(before, x), queries)
    elif recent.store is not None:
        x = recent.store.values(x.dtype)
    return handled(after, x), recent


def runs_codes(key: KVCache | None, value: KVCache | None) -> bool:
    """Whether one kernel was chosen for keys and values, of one layout, that reads their codes."""
    return key is not None and value is not None and key.kernel is not None and type(key.kernel) is type(value.kernel) and key.spec == value.spec


def _from_codes(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor | None:
    """[B, 1, H, D] by the kernel that was chosen for the cache; None where the values are to be had, or handlers want to see them."""
    recent = [getattr(x, _MARK, None) for x in (key, value)]
    stores = [r.store for r in recent if r is not None and r.store is not None]
    if len(stores) != 2 or _WATCHER.get() is not None or any(chain(module, place)[2] for place in "kv"):
        return None
    assert stores[0].policy is not None
    q = query[:, :, 0] * (1.0 if scaling is None else scaling * query.shape[-1] ** 0.5)  # kernels divide by √D
    return stores[0].policy.run(q, *stores).unsqueeze(1)


def _explicit(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    recent_key: Recent | None = None,
    recent_value: Recent | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The same, one step after the other; with the logits' soft cap and attention sinks (`s_aux`: one more logit for each head).

    recent_key, recent_value: tokens that are codes in `key` and `value`, and floats for some of the queries
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2)  # [B, H, T, S]
    if recent_key is not None and (w := recent_key.exact.shape[2]):
        exact_scores = query @ recent_key.exact.repeat_interleave(groups, 1).transpose(-1, -2)
        place = scores[..., recent_key.start : recent_key.start + w]
        place.copy_(torch.where(recent_key.still_exact(), exact_scores, place))
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    t, s = scores.shape[-2:]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and t > 1:
        # as sdpa's is_causal: aligned to the upper left, the state of a prefill
        mask = torch.ones(t, s, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        mask = mask[..., :s]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    if s_aux is not None:
        sinks = s_aux.to(scores).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, t, 1)
        p = torch.cat([scores, sinks], -1).to(exact).softmax(-1)[..., :-1].to(query.dtype)
    else:
        # a row that may attend to nothing (padding on the left) gives zeros, as sdpa does
        p = scores.to(exact).softmax(-1).nan_to_num(0.0).to(query.dtype)
    p = tap(module, "p", p.transpose(1, 2)).transpose(1, 2)
    p = nn.functional.dropout(p, dropout, module.training)
    y = p @ value
    if recent_value is not None and (w := recent_value.exact.shape[2]):
        at = slice(recent_value.start, recent_value.start + w)
        y = y + (p[..., at] * recent_value.still_exact()) @ (recent_value.exact.repeat_interleave(groups, 1) - value[:, :, at])
    return y.transpose(1, 2).contiguous()
