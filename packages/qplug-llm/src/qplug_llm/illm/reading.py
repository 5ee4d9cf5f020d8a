"""What a Llama-like decoder computes, read from its modules, and proven on a small random twin of its class.

Names say where things are, and nothing about what a family does with them: one multiplies the embedding by √C, one norms q and k, one adds 1 to every
gain.  So the reading is computed in float64 on a twin and compared with the twin's own logits; a family that does anything else is refused.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qplug_llm import twin
from qplug_llm.illm.swiglu_smooth import SplitSiLU, is_silu

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_BLOCK = {"self_attn": set(PROJECTIONS.values()), "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"}}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_CLOSE = 1e-4  # of the largest logit: transformers' norms compute in float32


@dataclass(frozen=True)
class Shape:
    """heads: of queries, and of keys and values;  dim: of a head;  eps: of the norms"""

    heads: tuple[int, int]
    dim: int
    eps: float


def shape_of(model: nn.Module) -> Shape:
    config: Any = model.config
    return Shape((config.num_attention_heads, twin.kv_heads(config)), twin.head_dim(config), eps_of(model.get_submodule("model.norm")))


def eps_of(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) or 0.0)


def linears_of(model: nn.Module) -> list[str]:
    """The paths of all linear layers inside the blocks, in order."""
    blocks = model.get_submodule("model.layers")
    names = [f"{part}.{name}" for part, own in _BLOCK.items() for name in sorted(own - {"act_fn"})]
    return [f"model.layers.{i}.{name}" for i in range(len(blocks)) for name in names]  # type: ignore[arg-type]


def foreign(model: nn.Module) -> list[str]:
    """What about the modules of `model` is not as in a Llama; empty where nothing is."""
    config: Any = getattr(model, "config", None)
    found = []
    for path in ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"):
        try:
            model.get_submodule(path)
        except AttributeError:
            found.append(f"it has no module {path!r}")
    if found or config is None:
        return found or ["it has no config"]
    for path, block in model.get_submodule("model.layers").named_children():
        wanted = {*_NORMS, *_BLOCK}
        if (names := {n for n, _ in block.named_children()}) != wanted:
            found.append(f"model.layers.{path} has the modules {', '.join(sorted(names ^ wanted))} too many or too few")
            continue
        for part, own in _BLOCK.items():
            names = {n for n, _ in block.get_submodule(part).named_children()}
            if extra := sorted(names - own - {"taps"}):
                found.append(f"model.layers.{path}.{part} has a module {extra[0]!r}")
            if lost := sorted(own - names):
                found.append(f"model.layers.{path}.{part} has no module {lost[0]!r}")
            elif "taps" in names and len(list(block.get_submodule(f"{part}.taps").children())):
                found.append(
                    f"model.layers.{path}.{part}: a rule quantizes what is tapped there (q, k, v or p); the integer program has widths of its own"
                )
        activation = getattr(block.get_submodule("mlp"), "act_fn", None)
        if activation is not None and not isinstance(activation, SplitSiLU) and not is_silu(activation):
            found.append(f"model.layers.{path}.mlp.act_fn is {type(activation).__name__}; DI-SwiGLU is made of SiLU")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()) or getattr(config, "sliding_window", None):
        found.append("its attention has a sliding window")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        found.append(f"rotary embeddings of type {rope['rope_type']!r} change with the length of the text, and tables do not")
    return found


def differs(model: nn.Module) -> str | None:
    """How far the reading is from what the class computes, tried on a twin; None where it is the same."""
    try:
        small = twin.build(model, (0, 1)).model
    except Exception as e:  # whatever a foreign class raises
        return f"no small twin of {type(model).__name__} could be made to check what it computes ({type(e).__name__}: {e})"
    if wrong := foreign(small):
        return f"a small twin of {type(model).__name__} is built otherwise: {wrong[0]}"
    vocabulary = small.get_parameter("model.embed_tokens.weight").shape[0]
    ids = torch.randint(0, vocabulary, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = small(input_ids=ids, use_cache=False).logits.double()
        read = logits(small, ids)
    gap = float((own - read).abs().max() / own.abs().max()) if own.shape == read.shape else float("inf")
    return (
        None
        if gap < _CLOSE
        else f"{type(model).__name__} computes something else than a Llama: on a twin the logits differ by {gap:.2g} of the largest"
    )


def rotary_tables(model: nn.Module, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position.  [P, D] float64"""
    cos, sin = model.get_submodule("model.rotary_emb")(torch.zeros(1, dtype=torch.float64), torch.arange(positions).unsqueeze(0))
    return cos[0].double(), sin[0].double()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The reading, in float64, of a float model: what the integer program stands for.  [B, T] → [B, T, V]"""
    shape, (cos, sin) = shape_of(model), rotary_tables(model, ids.shape[1])
    values = {name: p.detach().double() for name, p in model.named_parameters(remove_duplicate=False)}

    def linear(x: Tensor, path: str) -> Tensor:
        y = x @ values[f"{path}.weight"].T
        return y + values[f"{path}.bias"] if f"{path}.bias" in values else y

    def norm(x: Tensor, path: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + shape.eps).rsqrt() * values[f"{path}.weight"]

    def heads(x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    x = values["model.embed_tokens.weight"][ids]
    for path, block in model.get_submodule("model.layers").named_children():
        at = f"model.layers.{path}"
        h = norm(x, f"{at}.input_layernorm")
        q = turned(heads(linear(h, f"{at}.self_attn.q_proj"), shape.heads[0]))
        k = turned(heads(linear(h, f"{at}.self_attn.k_proj"), shape.heads[1]))
        v = heads(linear(h, f"{at}.self_attn.v_proj"), shape.heads[1])
        k, v = (t.repeat_interleave(shape.heads[0] // shape.heads[1], 1) for t in (k, v))
        scores = (q @ k.mT * shape.dim**-0.5).masked_fill(~torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(), -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        gate, up, activation = linear(h, f"{at}.mlp.gate_proj"), linear(h, f"{at}.mlp.up_proj"), block.get_submodule("mlp.act_fn")
        inside = gate * activation.s.double() if isinstance(activation, SplitSiLU) else gate
        x = x + linear(gate * inside.sigmoid() * up, f"{at}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")
