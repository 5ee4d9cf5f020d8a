"""A small random model of the same class: what a structure is read from, and what a claim about it is tried on.

The model at hand may be large, and its weights are on meta; its config says all about its structure.  So the twin takes that config with few layers,
heads and channels, keeps every flag and every ratio that decides which code runs, and is filled with lively random numbers in float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qplug_llm import attention

# words in names of sizes that are neither heads nor the hidden size: all become small and pairwise different
_SIZES = ("intermediate", "inner", "ffn", "ff_dim", "d_ff", "rank", "proj_dim", "mlp_dim", "width")
_COUNTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "n_group": 2,
    "topk_group": 1,
}
# channels of a head where keys and values are latent: beside the rotary ones, which are the head's size to the rotary embedding
_LATENT = {"qk_rope_head_dim": 0, "qk_nope_head_dim": 4, "v_head_dim": 6}


@dataclass(frozen=True)
class Twin:
    """The small model, and which layer of the real one each of its layers stands for."""

    model: nn.Module
    layers: tuple[int, ...]


def build(model: nn.Module, layers: Sequence[int], seed: int = 0) -> Twin:
    """A twin of `model` whose blocks stand for those of `layers`; raises whatever the model's class raises."""
    config: Any = model.config
    small = small_config(config, layers)
    if attention.can_be_set(model):
        attention.register()
        small._attn_implementation = attention.NAME
    else:
        small._attn_implementation = "eager"
    small._experts_implementation = "eager"  # grouped matrix products know no float64
    with torch.random.fork_rng(devices=[]):
        twin = type(model)(small).eval().double().requires_grad_(False)
    randomize(twin, seed)
    return Twin(twin, tuple(layers))


def head_dim(config: Any) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or config.num_attention_heads


def turned_dims(model: nn.Module) -> int:
    """How many channels of each head the rotary embedding of `model` turns: two for each of its frequencies."""
    counts = {b.numel() for name, b in model.named_buffers() if name.endswith("inv_freq")}
    return 2 * counts.pop() if len(counts) == 1 else _rotary_dims(model.config)


def _rotary_dims(config: Any) -> int:
    """What the config says; all of a head's channels where it says nothing."""
    rope = getattr(config, "rope_parameters", None)
    nested = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    factor = nested or getattr(config, "partial_rotary_factor", None) or getattr(config, "rotary_pct", None) or 1.0
    absolute = getattr(config, "rotary_dim", None)
    return int(absolute or head_dim(config) * factor)


def per_layer(config: Any) -> dict[str, Any]:
    """The entries of the config that hold one value for each layer."""
    return {k: v for k, v in config.to_dict().items() if isinstance(v, list | tuple) and len(v) == config.num_hidden_layers}


def small_config(config: Any, layers: Sequence[int]) -> Any:
    """The same config with `len(layers)` layers, few heads and few channels."""
    data = config.to_dict()
    for key in ("quantization_config", "dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path"):
        data.pop(key, None)
    native = dict(getattr(config, "attribute_map", {}))

    def put(name: str, value: Any) -> None:
        key = native.get(name, name)
        if data.get(key) is not None:
            data[key] = value

    lists = per_layer(config)
    hidden, heads, kv, dim = config.hidden_size, config.num_attention_heads, kv_heads(config), head_dim(config)
    groups = heads // kv
    few_kv = 1 if kv == 1 and groups > 1 else (2 if groups > 1 else 3)
    few = few_kv * min(groups, 2)
    fraction = _rotary_dims(config) / dim
    small_dim = next((d for d in range(8, 41, 2) if int(d * fraction) % 2 == 0 and int(d * fraction) > 0), 8)
    # the hidden size is the heads' sum, or it is not: both stay true
    small_hidden = few * small_dim if hidden == heads * dim else few * (small_dim + 4)
    fresh = iter(range(small_hidden + 12, 10_000, 12))
    for key, value in list(data.items()):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if key.endswith("token_id"):
            data[key] = min(value, 3)
        elif key in _COUNTS:
            data[key] = min(value, _COUNTS[key])
        elif key == "rotary_dim":
            data[key] = int(small_dim * fraction)
        elif key in _LATENT:
            data[key] = small_dim + _LATENT[key]
        elif key == "qk_head_dim":
            data[key] = 2 * small_dim + _LATENT["qk_nope_head_dim"]
        elif any(word in key for word in _SIZES):
            data[key] = small_hidden if value == hidden else next(fresh)
    for key, value in data.items():
        if key.endswith("token_id") and isinstance(value, list | tuple):
            data[key] = [min(v, 3) for v in value]
    put("hidden_size", small_hidden)
    put("num_attention_heads", few)
    put("num_key_value_heads", few_kv)
    put("num_kv_heads", few_kv)
    put("head_dim", small_dim)
    put("vocab_size", 61)
    put("num_hidden_layers", len(layers))
    put("max_position_embeddings", 64)
    for key, values in lists.items():
        data[key] = [values[i] for i in layers]
    _keep_dense(config, data, layers)
    rope = data.get("rope_parameters")
    if isinstance(rope, dict):
        for key, value in rope.items():
            if isinstance(value, list | tuple):
                rope[key] = list(value)[: int(small_dim * fraction) // 2]
    return type(config).from_dict(data)


def _keep_dense(config: Any, data: dict[str, Any], layers: Sequence[int]) -> None:
    """Layers that are dense among mixtures of experts stay so, in place: families say which by their number."""
    if data.get("first_k_dense_replace") is not None:
        data["first_k_dense_replace"] = sum(layer < config.first_k_dense_replace for layer in layers)
    if data.get("decoder_sparse_step") is not None:
        listed, step = set(getattr(config, "mlp_only_layers", None) or ()), config.decoder_sparse_step
        data["mlp_only_layers"] = [i for i, layer in enumerate(layers) if layer in listed or (layer + 1) % step]
        data["decoder_sparse_step"] = 1


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Fill `model` in place: gains in [0.5, 1.5], biases of 0.3, matrices that keep the size of what they multiply, embeddings of 1."""
    g = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in done:
                continue
            done.add(id(p))
            if p.ndim >= 2:
                noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
                fan_in = 1 if isinstance(module, nn.Embedding) else (p.shape[0] if hasattr(module, "nf") else p.shape[-1])
                p.copy_(noise / fan_in**0.5)
            elif name.endswith("bias"):
                p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
            else:
                p.copy_(0.5 + torch.rand(p.shape, generator=g, dtype=torch.float64))


def outputs_of(out: Any) -> Tensor:
    """What counts of a transformers output: logits [B, T, V], or the last hidden states [B, T, C] of a model without a head."""
    logits = getattr(out, "logits", None)
    return out.last_hidden_state if logits is None else logits


def sample_ids(model: nn.Module, batch: int = 2, length: int = 9) -> Tensor:
    """Token ids [B, T] for a twin."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(4, model.config.vocab_size, (batch, length), generator=g)  # type: ignore[union-attr,arg-type]
