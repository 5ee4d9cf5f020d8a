"""Layers of transformers' `Cache` whose keys and values are packed codes, as the policies in the model say.

Nothing has to be passed to `generate()` or to a forward pass: a hook on every attention looks whether a policy (`KVCache`) sits at its taps, and puts
a quantized layer where the cache that comes by has an empty float one.  So the policy is the checkpoint's, every class of caches that is a list of
layers will do, and a cache may hold float and quantized layers beside each other.

Caches with floats in them, or of a fixed size, are refused: they would be read as floats, and nobody would notice.
"""

from collections.abc import Callable
from typing import Any

from qcore.errors import SpecError
from qcore.modules.kv_cache import KVCache, KVStore, Recent, chain
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from qplug_llm.attention import handled, mark, runs_codes

_PLACES = ("k", "v")


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one attention, packed.  attention: the module at whose taps the policies sit"""

    is_sliding = False

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self._chains = {place: chain(attention, place)[:2] for place in _PLACES}
        self.stores = {place: KVStore(policy) for place, (_, policy) in self._chains.items()}

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens can be taken back: not where they share a scale, or were floats when they were the last."""
        return all(p is None or (p.window == 0 and p.step == 1) for _, p in self._chains.values())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens [B, H, T, D]; returns all that are kept, [B, H, S, D], as later queries will see them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # a kernel for one new token reads the codes themselves
        decode = key_states.shape[2] != 1 or self.is_sliding or not runs_codes(*(policy for _, policy in self._chains.values()))
        return self._add("k", key_states, decode), self._add("v", value_states, decode)

    def _add(self, place: str, x: Tensor, decode: bool) -> Tensor:
        before, policy = self._chains[place]
        values, recent = self.stores[place].append(handled(before, x), decode=decode)
        values, recent = self._visible(self.stores[place], values, recent, x.shape[2])
        return values if policy is None else mark(values, recent)

    def _visible(self, store: KVStore, values: Tensor, recent: Recent, new: int) -> tuple[Tensor, Recent]:
        """What the queries of this call may look at."""
        return values, recent

    def get_seq_length(self) -> int:
        return self.stores["k"].length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def nbytes(self) -> int:
        """Bytes that are kept from one call to the next."""
        return sum(store.nbytes() for store in self.stores.values())

    def reset(self) -> None:
        self.stores = {place: KVStore(policy) for place, (_, policy) in self._chains.items()}
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back; a negative number, as transformers counts.  SpecError where `is_croppable` says no."""
        if tokens_to_remove > 0:
            raise SpecError(f"crop takes a negative number of tokens, got {tokens_to_remove}")
        for store in self.stores.values():
            store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda t: t.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        self._apply(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._apply(lambda t: t.to(self.device, non_blocking=True))

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores.values():
            store.apply(fn)


class QuantizedSlidingLayer(QuantizedLayer):
    """The same for attention that looks back over `sliding_window` tokens, its own included: what lies further back is let go."""

    is_sliding = True
    is_croppable = False

    def __init__(self, attention: nn.Module, sliding_window: int) -> None:
        super().__init__(attention)
        self.sliding_window = sliding_window

    def _visible(self, store: KVStore, values: Tensor, recent: Recent, new: int) -> tuple[Tensor, Recent]:
        back = self.sliding_window - 1
        seen = min(store.length - new, back) + new
        cut = values.shape[2] - seen
        store.drop(values.shape[2] - back)
        return values[:, :, cut:], recent.without(cut)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past, back = self.get_seq_length(), self.sliding_window - 1
        return min(past, back) + query_length, max(past - back, 0)

    def get_max_length(self) -> int:
        return self.sliding_window


def watch_caches(model: nn.Module) -> None:
    """Hook every attention of `model`, in place, so that caches are quantized where a policy says so; safe to call again."""
    for module in model.modules():
        if hasattr(module, "layer_idx") and _quantize_cache not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_quantize_cache, with_kwargs=True)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in a cache, packed or not."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, QuantizedLayer):
            total += layer.nbytes()
        else:
            total += sum(t.numel() * t.element_size() for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
    return total


def _quantize_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention runs: a quantized layer in the place of the cache's empty float one."""
    if "taps" not in module._modules or not any(isinstance(chain(module, place)[1], KVCache) for place in _PLACES):
        return
    cache = next((c for c in (*kwargs.values(), *args) if isinstance(c, Cache)), None)
    if cache is None:
        return
    index = int(module.layer_idx)  # type: ignore[arg-type]
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, QuantizedLayer):
        return
    if type(layer) is DynamicLayer and not layer.get_seq_length():
        cache.layers[index] = QuantizedLayer(module)
    elif type(layer) is DynamicSlidingWindowLayer and not layer.get_seq_length():
        cache.layers[index] = QuantizedSlidingLayer(module, layer.sliding_window)
    elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        raise SpecError(
            f"the cache holds {cache.get_seq_length(index)} tokens as floats, and this model's policy quantizes its cache; begin with an empty one"
        )
    else:
        raise SpecError(
            f"a cache layer {type(layer).__name__} cannot be quantized; use a DynamicCache: generate() makes one without cache_implementation"
        )
