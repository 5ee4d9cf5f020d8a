"""RWKV-7 ("Goose") as an nn.Module that loads published checkpoints.

In each head the state S (values × keys) follows, for every token t,

    S ← S (diag(w) + a bᵀ) + v kᵀ,    y = S r

with w = exp(-exp(-1/2)·sigmoid(…)) in (0.545, 1), a = -κ, b = κ ∘ (in-context learning rate), |κ| = 1.
Source: https://arxiv.org/abs/2503.14456; names of parameters: https://github.com/BlinkDL/RWKV-LM, `blocks.3.att.x_r` and so on.  Element-wise vectors
are modules here (`blocks.3.att.x_r.mu`); `rwkv_files.py` translates.

Blocks hand one tensor to the next, [2, B, T, C]: the residual stream, and the first layer's values, which all later layers mix into theirs.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qplug_ssm.elementwise import Elementwise
from qplug_ssm.precision import wide

CHUNK = 16  # within a chunk decays are divided out: w ≥ 0.545, so factors stay below 0.545**-16 = 1.7e4


@dataclass(frozen=True, kw_only=True)
class RWKV7Config:
    """Sizes of the model; `config.json` holds these fields.

    decay_lora, a_lora, v_lora, gate_lora: ranks of the low-rank maps that make w, the learning rate, the share of the first layer's values, the gate
    """

    vocab_size: int
    n_layer: int
    n_embd: int
    head_size: int = 64
    ffn_size: int
    decay_lora: int
    a_lora: int
    v_lora: int
    gate_lora: int
    layer_norm_epsilon: float = 1e-5
    group_norm_epsilon: float = 64e-5
    model_type: str = "rwkv7"

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size


@dataclass
class LayerState:
    """What one layer remembers.  att_shift, ffn_shift: [B, C], the last token's inputs; wkv: [B, H, N, N]"""

    att_shift: Tensor
    ffn_shift: Tensor
    wkv: Tensor


def shifted(x: Tensor, last: Tensor | None) -> Tensor:
    """Each token's predecessor.  x: [B, T, C]; last: [B, C], before the first token; None = zeros"""
    first = torch.zeros_like(x[:, :1]) if last is None else last.unsqueeze(1).to(x.dtype)
    return torch.cat([first, x[:, :-1]], 1)


def wkv7_sequential(state: Tensor, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written above, token by token.  state: [B, H, V, K]; the others [B, H, T, K] (v: V) → y [B, H, T, V], last state"""
    outputs = []
    for t in range(r.shape[2]):
        removed = (state @ a[:, :, t].unsqueeze(-1)) @ b[:, :, t].unsqueeze(-2)
        state = state * log_w[:, :, t].exp().unsqueeze(-2) + removed + v[:, :, t].unsqueeze(-1) @ k[:, :, t].unsqueeze(-2)
        outputs.append((state @ r[:, :, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 2), state


def wkv7_chunked(state: Tensor, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same function as `wkv7_sequential`, 16 tokens at a time.

    With c the running sum of log w within a chunk, S the state before it and u_t = S_{t-1} a_t,

        u_t = S (e^{c_{t-1}} a_t) + Σ_{i<t} [u_i ⟨e^{-c_i} b_i, e^{c_{t-1}} a_t⟩ + v_i ⟨e^{-c_i} k_i, e^{c_{t-1}} a_t⟩]

    is a triangular system; its inverse is the product (I + M)(I + M²)(I + M⁴)(I + M⁸), for M is strictly triangular.
    """
    length = r.shape[2]
    padding = -length % CHUNK
    if padding:
        # zeros after the end: log w = 0 and k = a = 0 leave the state alone
        r, log_w, k, v, a, b = (F.pad(x, (0, 0, 0, padding)) for x in (r, log_w, k, v, a, b))
    r, log_w, k, v, a, b = (x.unflatten(2, (-1, CHUNK)) for x in (r, log_w, k, v, a, b))
    running = log_w.cumsum(3)
    grown, shrunk = running.exp(), (-running).exp()
    r, a, b, k = r * grown, a * (running - log_w).exp(), b * shrunk, k * shrunk
    power = (a @ b.mT).tril(-1)
    inverse = torch.eye(CHUNK, dtype=power.dtype) + power
    for _ in range(int(math.log2(CHUNK)) - 1):
        power = power @ power
        inverse = inverse + inverse @ power
    from_state, from_values = inverse @ a, inverse @ ((a @ k.mT).tril(-1) @ v)
    added, last = v.mT @ k, grown[:, :, :, -1:]
    states, removed = [], []
    for p, q, b_n, added_n, last_n in zip(*(x.unbind(2) for x in (from_state, from_values, b, added, last)), strict=True):
        states.append(state)
        u = p @ state.mT + q
        removed.append(u)
        state = (state + u.mT @ b_n + added_n) * last_n
    before, u = torch.stack(states, 2), torch.stack(removed, 2)
    y = r @ before.mT + (r @ b.mT).tril() @ u + (r @ k.mT).tril() @ v
    return y.flatten(2, 3)[:, :, :length], state


class TimeMix7(nn.Module):
    """The half of a block that mixes tokens (`att`)."""

    w0: Tensor
    w1: Tensor
    w2: Tensor
    a0: Tensor
    a1: Tensor
    a2: Tensor
    v0: Tensor
    v1: Tensor
    v2: Tensor
    g1: Tensor
    g2: Tensor

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width, self.heads, self.size = config.n_embd, config.n_head, config.head_size
        self.layer = layer
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (Elementwise(width) for _ in range(6))
        self.k_k, self.k_a, self.r_k = (Elementwise(width) for _ in range(3))
        ranks = {"w": config.decay_lora, "a": config.a_lora, "g": config.gate_lora} | ({"v": config.v_lora} if layer else {})
        for name, rank in ranks.items():
            if name != "g":
                self.register_parameter(f"{name}0", nn.Parameter(torch.zeros(width)))
            self.register_parameter(f"{name}1", nn.Parameter(torch.zeros(width, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.zeros(rank, width)))
        self.receptance, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(self.heads, width, eps=config.group_norm_epsilon)

    def forward(self, x: Tensor, v_first: Tensor, state: LayerState | None = None) -> tuple[Tensor, Tensor]:
        """x: [B, T, C] → the residual update, and the first layer's values."""
        delta = shifted(x, None if state is None else state.att_shift) - x
        xr, xw, xk, xv, xa, xg = (x + mix(delta) for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g))
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        log_w = -math.exp(-0.5) * torch.sigmoid(wide(self.w0 + torch.tanh(xw @ self.w1) @ self.w2))
        if self.layer:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        else:
            v_first = v
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        kk = F.normalize(wide(self.k_k(k)).unflatten(-1, (self.heads, self.size)), dim=-1).flatten(-2)
        k = k + self.k_a(k * (a - 1))
        heads = (wide(t).unflatten(-1, (self.heads, self.size)).transpose(1, 2) for t in (r, log_w, k, v, -kk, kk * a))
        with torch.autocast("cpu", enabled=False):
            own = next(heads)
            start = own.new_zeros(*own.shape[:2], self.size, self.size) if state is None else state.wkv.to(own.dtype)
            y, last = (wkv7_sequential if x.shape[1] == 1 else wkv7_chunked)(start, own, *heads)
        if state is not None:
            state.att_shift, state.wkv = x[:, -1], last
        y = self.ln_x(y.transpose(1, 2).flatten(0, 1).flatten(1).to(x.dtype)).unflatten(0, x.shape[:2])
        bonus = self.r_k(r * k).unflatten(-1, (self.heads, self.size)).sum(-1, keepdim=True) * v.unflatten(-1, (self.heads, self.size))
        return self.output((y + bonus.flatten(-2)) * g), v_first


class ChannelMix7(nn.Module):
    """The half of a block that mixes channels (`ffn`)."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = Elementwise(config.n_embd)
        self.key = nn.Linear(config.n_embd, config.ffn_size, bias=False)
        self.value = nn.Linear(config.ffn_size, config.n_embd, bias=False)

    def forward(self, x: Tensor, state: LayerState | None = None) -> Tensor:
        delta = shifted(x, None if state is None else state.ffn_shift) - x
        if state is not None:
            state.ffn_shift = x[:, -1]
        return self.value(torch.relu(self.key(x + self.x_k(delta))).square())


class Block7(nn.Module):
    """One layer."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width, eps = config.n_embd, config.layer_norm_epsilon
        if layer == 0:
            self.ln0 = nn.LayerNorm(width, eps=eps)
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.att, self.ffn = TimeMix7(config, layer), ChannelMix7(config)

    def forward(self, stream: Tensor, state: LayerState | None = None) -> Tensor:
        """stream: [2, B, T, C], the residual and the first layer's values (whatever stands there before the first layer is not read)."""
        x, v_first = stream.unbind(0)
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        update, v_first = self.att(self.ln1(x), v_first, state)
        x = x + update
        return torch.stack([x + self.ffn(self.ln2(x), state), v_first.to(x.dtype)])


class RWKV7(nn.Module):
    """The language model: tokens [B, T] → logits [B, T, V]."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block7(config, i) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, state: list[LayerState] | None = None) -> Tensor:
        """With a `state` (`empty_state`) the sequence goes on from there, and the state is brought up to its end in place."""
        x = self.emb(tokens)
        stream = torch.stack([x, torch.zeros_like(x)])
        for i, block in enumerate(self.blocks):
            stream = block(stream) if state is None else block(stream, state[i])
        return self.head(self.ln_out(stream[0]))

    def empty_state(self, batch: int) -> list[LayerState]:
        """The state before the first token."""
        c, like = self.config, self.emb.weight
        return [
            LayerState(
                like.new_zeros(batch, c.n_embd), like.new_zeros(batch, c.n_embd), wide(like).new_zeros(batch, c.n_head, c.head_size, c.head_size)
            )
            for _ in self.blocks
        ]


def sizes_of(shapes: Any) -> RWKV7Config:
    """The configuration that tensors of a published checkpoint imply.  shapes: name → shape, such as (1, 1, C)"""
    _, size = shapes["blocks.0.att.r_k"]
    vocab, width = shapes["emb.weight"]
    layers = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks."))
    last = f"blocks.{layers - 1}.att"
    return RWKV7Config(
        vocab_size=vocab,
        n_layer=layers,
        n_embd=width,
        head_size=size,
        ffn_size=shapes["blocks.0.ffn.key.weight"][0],
        decay_lora=shapes["blocks.0.att.w1"][-1],
        a_lora=shapes["blocks.0.att.a1"][-1],
        v_lora=shapes[f"{last}.v1"][-1] if f"{last}.v1" in shapes else 1,
        gate_lora=shapes["blocks.0.att.g1"][-1],
    )
