"""A Llama-like decoder as a program of integers: ids in, integer logits out, nothing but integer tensors between.

    residual stream (INT32, one step for each token)  →  DI-Norm  →  codes  →  products  →  SwiGLU or attention  →  codes  →  product  →  added

Everything is done for each token by itself, attention for each query over its valid keys.  So the same token with the same past gives the same bits
whatever else is in the batch, prefilled or step by step.  Speed is no goal: products run as torch's plain integer matrix products.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from qcore.errors import SpecError
from torch import Tensor, nn

from qplug_llm.illm.dyadic import Dyadic, Wide, aligned, requantize
from qplug_llm.illm.operators import ExpMode, add, argmax, di_clipped_softmax, di_norm, di_swiglu, mix, product, rotate

_SCORE_BITS, _LOGIT_BITS = 30, 31


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How many bits everything has that a recipe does not speak of.  `PAPER` holds the paper's.

    between:       what a product hands to an operator: q and k before the rotary embedding, gate and up before SwiGLU, branches before they are added
    queries:       what scores are multiplied from;  cache: keys and values
    scores:        distances to a row's maximum, after clipping;  probabilities: p_out of softmax;  sigmoid: p_out inside SwiGLU
    outside:       embedding, head, and what the head reads
    clip:          c of clipped softmax
    exp:           form of the exponential, see `di_exp`
    epsilon:       norms keep their ε
    rounding:      of codes and zero points, see `requantize`
    """

    between: int = 16
    queries: int = 8
    cache: int = 8
    scores: int = 8
    probabilities: int = 15
    sigmoid: int = 16
    outside: int = 8
    clip: int = 15
    exp: ExpMode = "q16"
    epsilon: bool = True
    rounding: Literal["one-rounding", "paper"] = "one-rounding"

    def __post_init__(self) -> None:
        for name, most in (("between", 16), ("queries", 8), ("cache", 8), ("scores", 16), ("probabilities", 16), ("sigmoid", 16), ("outside", 8)):
            if not 2 <= getattr(self, name) <= most:
                raise SpecError(f"integer widths: {name} has 2 to {most} bits, got {getattr(self, name)}")
        if not 1 <= self.clip <= 255:
            raise SpecError(f"integer widths: clip is 1 to 255, got {self.clip}")
        if self.exp not in ("paper", "q16"):
            raise SpecError(f"unknown exponential {self.exp!r}; have: paper, q16")
        if self.rounding not in ("one-rounding", "paper"):
            raise SpecError(f"unknown rounding {self.rounding!r}; have: one-rounding, paper")

    def cut(self, wide: Wide, bits: int) -> Dyadic:
        """`requantize`, with the rounding that was chosen."""
        return requantize(wide, bits, self.rounding)


PAPER = Widths(between=8, probabilities=8, sigmoid=8, epsilon=False, rounding="paper")


@dataclass
class IntegerCache:
    """Codes of keys and values of one batch, one scale for each token and head; `layers` grow in place.

    layers: (keys, values) of each block, codes [B, H, S, D] uint8;  valid: [B, S] bool, which places hold tokens
    """

    layers: list[tuple[Dyadic, Dyadic]] = field(default_factory=list)
    valid: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.valid is None else self.valid.shape[1]


def _after(past: Dyadic | None, new: Dyadic) -> Dyadic:
    if past is None:
        return new
    old, own = ((d.codes, d.m, d.k, d.zp) for d in (past, new))
    codes, m, k, zp = (torch.cat(pair, -2) for pair in zip(old, own, strict=True))
    return Dyadic(codes, m, k, zp, new.bits)


def _each(x: Dyadic, view: Callable[[Tensor], Tensor]) -> Dyadic:
    """The same view of codes and scales."""
    return Dyadic(view(x.codes), view(x.m), view(x.k), view(x.zp), x.bits)


class IntegerLinear(nn.Module):
    """Codes [N, K] and one dyadic scale for each row; gives the product at one step for each token."""

    codes: Tensor
    m: Tensor
    k: Tensor
    zp: Tensor

    def __init__(self, weight: Dyadic, input_bits: int) -> None:
        super().__init__()
        self.bits, self.input_bits = weight.bits, input_bits
        for name in ("codes", "m", "k", "zp"):
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight(self) -> Dyadic:
        return Dyadic(self.codes, self.m, self.k, self.zp, self.bits)

    def forward(self, x: Dyadic) -> Wide:
        return aligned(product(x, self.weight))


class IntegerNorm(nn.Module):
    """RMSNorm with a 16-bit gain.  eps: (m, k), or None to drop it"""

    gain: Tensor
    k: Tensor

    def __init__(self, gain: Wide, eps: tuple[int, int] | None) -> None:
        super().__init__()
        self.register_buffer("gain", gain.x)
        self.register_buffer("k", gain.k)
        self.eps = eps

    def forward(self, x: Wide) -> Wide:
        return di_norm(x, Wide(self.gain, torch.ones_like(self.k), self.k), eps=self.eps)


class IntegerAttention(nn.Module):
    """Grouped-query attention.  heads: (queries, keys and values);  scaling: of the scores, as (m, k)"""

    def __init__(
        self,
        projections: dict[str, IntegerLinear],
        heads: tuple[int, int],
        scaling: tuple[int, int],
        widths: Widths,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (projections[name] for name in "qkvo")
        self.heads, self.scaling, self.widths = heads, scaling, widths

    def forward(self, x: Dyadic, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Dyadic, Dyadic] | None) -> tuple[Wide, tuple[Dyadic, Dyadic]]:
        """x [B, T, C];  cos, sin [B, T, 1, D];  mask [B, 1, 1, T, S] bool  →  what is added to the stream [B, T, C], keys and values"""
        w, (h, kv) = self.widths, self.heads
        q = self._rotated(self.q(x), h, cos, sin, w.queries)  # [B, H, T, D]
        k = self._stored(past and past[0], self._rotated(self.k(x), kv, cos, sin, w.cache))
        v = self._stored(past and past[1], _by_head(w.cut(_split(self.v(x), kv), w.cache)))
        grouped = _each(q, lambda t: t.unflatten(1, (kv, h // kv)))
        scores = product(grouped, _one_more(k))  # [B, KV, G, T, S]
        scores = Wide(torch.where(mask, scores.x, 0), scores.m * self.scaling[0], scores.k + self.scaling[1])
        p = di_clipped_softmax(aligned(scores, _SCORE_BITS), mask, (w.clip, 0), w.scores, w.probabilities, w.exp)
        y = mix(p, _one_more(v))  # [B, KV, G, T, D], a step for each head
        joined = _join(y)
        return self.o(w.cut(joined, self.o.input_bits)), (k, v)

    def _rotated(self, x: Wide, heads: int, cos: Tensor, sin: Tensor, bits: int) -> Dyadic:
        """[B, T, H·D] → codes [B, H, T, D], one scale for each token and head."""
        narrow = self.widths.cut(x, self.widths.between).wide()
        return _by_head(self.widths.cut(rotate(_split(narrow, heads), cos, sin), bits))

    def _stored(self, past: Dyadic | None, new: Dyadic) -> Dyadic:
        return _after(past, Dyadic(new.codes.to(torch.uint8), new.m, new.k, new.zp, new.bits))


def _split(x: Wide, heads: int) -> Wide:
    """[B, T, H·D] → [B, T, H, D]"""
    return Wide(x.x.unflatten(-1, (heads, -1)), x.m.unsqueeze(-1), x.k.unsqueeze(-1))


def _by_head(x: Dyadic) -> Dyadic:
    """[B, T, H, D] → [B, H, T, D]"""
    return _each(x, lambda t: t.transpose(1, 2))


def _one_more(x: Dyadic) -> Dyadic:
    """[B, KV, S, D] → [B, KV, 1, S, D]"""
    return _each(x, lambda t: t.unsqueeze(2))


def _join(y: Wide) -> Wide:
    """[B, KV, G, T, D] with a step for each head → [B, T, H·D] at one step for each token."""
    parts = [t.expand_as(y.x).flatten(1, 2).transpose(1, 2).flatten(2) for t in (y.x, y.m, y.k)]
    return aligned(Wide(*parts))


class IntegerMLP(nn.Module):
    """SwiGLU and its three products.  smooth: [C] what the gate is multiplied with inside σ; None = nothing"""

    smooth: Tensor | None
    smooth_k: Tensor | None

    def __init__(self, gate: IntegerLinear, up: IntegerLinear, down: IntegerLinear, smooth: Wide | None, widths: Widths) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.widths = gate, up, down, widths
        self.register_buffer("smooth", None if smooth is None else smooth.x)
        self.register_buffer("smooth_k", None if smooth is None else smooth.k)

    def forward(self, x: Dyadic) -> Wide:
        w = self.widths
        gate, up = w.cut(self.gate(x), w.between), w.cut(self.up(x), w.between)
        smooth = None
        if self.smooth is not None and self.smooth_k is not None:
            smooth = Wide(self.smooth, torch.ones_like(self.smooth_k), self.smooth_k)
        return self.down(w.cut(di_swiglu(gate, up, smooth, w.sigmoid, w.exp), self.down.input_bits))


class IntegerBlock(nn.Module):
    def __init__(self, before: IntegerNorm, attention: IntegerAttention, between: IntegerNorm, mlp: IntegerMLP, widths: Widths) -> None:
        super().__init__()
        self.before, self.attention, self.between, self.mlp, self.widths = before, attention, between, mlp, widths

    def forward(self, x: Wide, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Dyadic, Dyadic] | None) -> tuple[Wide, tuple[Dyadic, Dyadic]]:
        branch, kept = self.attention(self.widths.cut(self.before(x), self.attention.q.input_bits), cos, sin, mask, past)
        x = add(x, self.widths.cut(branch, self.widths.between).wide())
        branch = self.mlp(self.widths.cut(self.between(x), self.mlp.gate.input_bits))
        return add(x, self.widths.cut(branch, self.widths.between).wide()), kept


class IntegerDecoder(nn.Module):
    """A decoder language model of integers alone; all its buffers are integers.

    cos, sin: [P, D] int16 in units of 2^-14, of every position
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, embedding: IntegerLinear, blocks: list[IntegerBlock], norm: IntegerNorm, head: IntegerLinear, cos: Tensor, sin: Tensor, widths: Widths
    ) -> None:
        super().__init__()
        self.widths = widths
        self.embedding, self.blocks, self.norm, self.head = embedding, nn.ModuleList(blocks), norm, head
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    @torch.no_grad()
    def forward(self, ids: Tensor, valid: Tensor | None = None, cache: IntegerCache | None = None) -> Wide:
        """Integer logits: x [B, T, V] that fits INT32, m and k [B, T, 1].

        ids:   [B, T]
        valid: [B, T] bool; False is padding, on either side: it takes no position, and nobody attends to it
        cache: of the tokens before; it grows in place
        """
        cache = IntegerCache() if cache is None else cache
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        start = cache.length
        everything = valid if cache.valid is None else torch.cat([cache.valid, valid], 1)
        position = (everything.cumsum(1) - 1).clamp(min=0)[:, start:]
        if everything.shape[1] > self.cos.shape[0]:
            raise SpecError(f"{everything.shape[1]} tokens, but there are rotary tables for {self.cos.shape[0]} positions")
        places = torch.arange(everything.shape[1], device=ids.device)
        causal = places[None, :] <= places[start:, None]  # [T, S]
        mask = (causal & everything[:, None, :])[:, None, None]
        cos, sin = (table[position].long().unsqueeze(2) for table in (self.cos, self.sin))
        e = self.embedding.weight
        x = Wide(e.codes[ids].long() - e.zp[ids], e.m[ids], e.k[ids])
        for i, block in enumerate(self.blocks):
            past = cache.layers[i] if i < len(cache.layers) else None
            x, kept = block(x, cos, sin, mask, past)
            cache.layers[i : i + 1] = [kept]
        cache.valid = everything
        logits = product(self.widths.cut(self.norm(x), self.head.input_bits), self.head.weight)
        return aligned(logits, _LOGIT_BITS)

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
        """The `count` likeliest next tokens, one after the other, by integer argmax.  [B, T] → [B, count]

        valid: of `ids`; pad on the left
        """
        cache, found = IntegerCache(), []
        logits = self(ids, valid, cache)
        for _ in range(count):
            found.append(argmax(logits.x[:, -1]))
            if len(found) < count:
                logits = self(found[-1].unsqueeze(1), None, cache)
        return torch.stack(found, 1)
