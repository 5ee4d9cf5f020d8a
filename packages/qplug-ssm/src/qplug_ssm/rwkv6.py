"""RWKV-6 ("Finch") as an nn.Module that loads published checkpoints.

In each head the state S (keys × values) follows, for every token t,

    y = r (diag(u) k vᵀ + S),    S ← diag(w) S + k vᵀ

with data-dependent decay w = exp(-exp(…)) and data-dependent mixing with the token before.
Source: https://arxiv.org/abs/2404.05892; names of parameters: https://github.com/BlinkDL/RWKV-LM, `blocks.3.att.time_maa_r` and so on.  Element-wise
vectors are modules here (`blocks.3.att.time_maa_r.mu`); `rwkv_files.py` translates.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qplug_ssm.elementwise import Elementwise
from qplug_ssm.precision import wide
from qplug_ssm.rwkv7 import LayerState, shifted


@dataclass(frozen=True, kw_only=True)
class RWKV6Config:
    """Sizes of the model; `config.json` holds these fields.

    mix_lora, decay_lora: ranks of the low-rank maps that make the mixing and the decay depend on the data
    """

    vocab_size: int
    n_layer: int
    n_embd: int
    head_size: int = 64
    ffn_size: int
    mix_lora: int
    decay_lora: int
    layer_norm_epsilon: float = 1e-5
    group_norm_epsilon: float = 64e-5
    model_type: str = "rwkv6"

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size


def wkv6(state: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, without its bonus term u.  state: [B, H, K, V]; the others [B, H, T, K] (v: V) → y [B, H, T, V], last state"""
    outputs = []
    for t in range(r.shape[2]):
        outputs.append((r[:, :, t].unsqueeze(-2) @ state).squeeze(-2))
        state = w[:, :, t].unsqueeze(-1) * state + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
    return torch.stack(outputs, 2) + u.sum(-1, keepdim=True) * v, state


class TimeMix6(nn.Module):
    """The half of a block that mixes tokens (`att`)."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        width, self.heads, self.size = config.n_embd, config.n_head, config.head_size
        self.time_maa_x, self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g = (Elementwise(width) for _ in range(6))
        self.time_maa_w1 = nn.Parameter(torch.zeros(width, 5 * config.mix_lora))
        self.time_maa_w2 = nn.Parameter(torch.zeros(5, config.mix_lora, width))
        self.time_decay = nn.Parameter(torch.zeros(width))
        self.time_decay_w1 = nn.Parameter(torch.zeros(width, config.decay_lora))
        self.time_decay_w2 = nn.Parameter(torch.zeros(config.decay_lora, width))
        self.time_faaaa = Elementwise(width)
        self.receptance, self.key, self.value, self.output, self.gate = (nn.Linear(width, width, bias=False) for _ in range(5))
        self.ln_x = nn.GroupNorm(self.heads, width, eps=config.group_norm_epsilon)

    def forward(self, x: Tensor, state: LayerState | None = None) -> Tensor:
        """x: [B, T, C] → the residual update"""
        delta = shifted(x, None if state is None else state.att_shift) - x
        low = torch.tanh((x + self.time_maa_x(delta)) @ self.time_maa_w1).unflatten(-1, (5, -1))  # [B, T, 5, rank]
        moved = torch.einsum("btfr,frc->fbtc", low, self.time_maa_w2)
        mixes = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        xw, xk, xv, xr, xg = (x + mix(delta) + delta * m for mix, m in zip(mixes, moved, strict=True))
        r, k, v, g = self.receptance(xr), self.key(xk), self.value(xv), F.silu(self.gate(xg))
        w = torch.exp(-torch.exp(wide(self.time_decay + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2)))
        heads = [wide(t).unflatten(-1, (self.heads, self.size)).transpose(1, 2) for t in (r, k, v, w, self.time_faaaa(r * k))]
        with torch.autocast("cpu", enabled=False):
            own = heads[0]
            y, last = wkv6(own.new_zeros(*own.shape[:2], self.size, self.size) if state is None else state.wkv.to(own.dtype), *heads)
        if state is not None:
            state.att_shift, state.wkv = x[:, -1], last
        y = self.ln_x(y.transpose(1, 2).flatten(0, 1).flatten(1).to(x.dtype)).unflatten(0, x.shape[:2])
        return self.output(y * g)


class ChannelMix6(nn.Module):
    """The half of a block that mixes channels (`ffn`)."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        width = config.n_embd
        self.time_maa_k, self.time_maa_r = Elementwise(width), Elementwise(width)
        self.key = nn.Linear(width, config.ffn_size, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(config.ffn_size, width, bias=False)

    def forward(self, x: Tensor, state: LayerState | None = None) -> Tensor:
        delta = shifted(x, None if state is None else state.ffn_shift) - x
        if state is not None:
            state.ffn_shift = x[:, -1]
        r = torch.sigmoid(self.receptance(x + self.time_maa_r(delta)))
        return r * self.value(torch.relu(self.key(x + self.time_maa_k(delta))).square())


class Block6(nn.Module):
    """One layer."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        width, eps = config.n_embd, config.layer_norm_epsilon
        if layer == 0:
            self.ln0 = nn.LayerNorm(width, eps=eps)
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.att, self.ffn = TimeMix6(config), ChannelMix6(config)

    def forward(self, x: Tensor, state: LayerState | None = None) -> Tensor:
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        x = x + self.att(self.ln1(x), state)
        return x + self.ffn(self.ln2(x), state)


class RWKV6(nn.Module):
    """The language model: tokens [B, T] → logits [B, T, V]."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block6(config, i) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, state: list[LayerState] | None = None) -> Tensor:
        """With a `state` (`empty_state`) the sequence goes on from there, and the state is brought up to its end in place."""
        x = self.emb(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x) if state is None else block(x, state[i])
        return self.head(self.ln_out(x))

    def empty_state(self, batch: int) -> list[LayerState]:
        """The state before the first token."""
        c, like = self.config, self.emb.weight
        return [
            LayerState(
                like.new_zeros(batch, c.n_embd), like.new_zeros(batch, c.n_embd), wide(like).new_zeros(batch, c.n_head, c.head_size, c.head_size)
            )
            for _ in self.blocks
        ]


def sizes_of(shapes: Any) -> RWKV6Config:
    """The configuration that tensors of a published checkpoint imply.  shapes: name → shape, such as (1, 1, C)"""
    _, size = shapes["blocks.0.att.time_faaaa"]
    vocab, width = shapes["emb.weight"]
    return RWKV6Config(
        vocab_size=vocab,
        n_layer=1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
        n_embd=width,
        head_size=size,
        ffn_size=shapes["blocks.0.ffn.key.weight"][0],
        mix_lora=shapes["blocks.0.att.time_maa_w1"][-1] // 5,
        decay_lora=shapes["blocks.0.att.time_decay_w1"][-1],
    )
