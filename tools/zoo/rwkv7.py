"""RWKV-7 ("Goose") in plain torch, with the parameter names of the published checkpoints.

Two forms of the same model:

* ``RWKV7.step``: the reference, one token at a time, with an explicit state (the two shifted inputs and the matrix state);
* ``RWKV7.forward``: whole sequences; the matrix state moves in chunks of 16 tokens (see ``wkv7_chunked``).

In each head the state S (values x keys) follows

    S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T,    y_t = S_t r_t

with w in (exp(-exp(-1/2)), 1), a = -kk, b = kk * (in-context learning rate), |kk| = 1.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

CHUNK = 16
"""Within a chunk decays are divided out: w >= 0.545, so the factors stay below 0.545 ** -16 = 1.7e4, harmless in float32."""


@dataclass
class RWKV7Config:
    """The architecture; ``config.json`` holds these fields."""

    vocab_size: int = 1024
    n_layer: int = 4
    n_embd: int = 256
    head_size: int = 64
    ffn_size: int = 1024
    decay_lora: int = 32
    a_lora: int = 32
    v_lora: int = 32
    gate_lora: int = 64
    layer_norm_epsilon: float = 1e-5
    group_norm_epsilon: float = 64e-5
    model_type: str = field(default="rwkv7")

    @property
    def n_head(self) -> int:
        """Number of heads."""
        return self.n_embd // self.head_size


def wkv7_step(
    state: torch.Tensor,
    r: torch.Tensor,
    log_w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: state [..., V, K], the others [..., K] (v: [..., V]); returns y [..., V] and the new state."""
    removed = (state @ a.unsqueeze(-1)) @ b.unsqueeze(-2)
    state = state * log_w.exp().unsqueeze(-2) + removed + v.unsqueeze(-1) @ k.unsqueeze(-2)
    return (state @ r.unsqueeze(-1)).squeeze(-1), state


def wkv7_sequential(
    r: torch.Tensor, log_w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """All tensors [B, H, T, N]; the state starts at zero. The reference for ``wkv7_chunked``."""
    state = r.new_zeros(*r.shape[:2], v.shape[-1], k.shape[-1])
    outputs = []
    for t in range(r.shape[2]):
        y, state = wkv7_step(state, *(x[:, :, t] for x in (r, log_w, k, v, a, b)))
        outputs.append(y)
    return torch.stack(outputs, dim=2)


def wkv7_chunked(r: torch.Tensor, log_w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same as ``wkv7_sequential``, a chunk of tokens at a time.

    With c the running sum of log w within a chunk, u_t = S_{t-1} a_t, and S the state before the chunk:

        u_t = S (e^{c_{t-1}} a_t) + sum_{i<t} [u_i <e^{-c_i} b_i, e^{c_{t-1}} a_t> + v_i <e^{-c_i} k_i, e^{c_{t-1}} a_t>]

    is a triangular system; its inverse is the product of (I + M)(I + M^2)(I + M^4)(I + M^8), for M is strictly triangular.
    """
    batch, heads, length, size = r.shape
    padding = -length % CHUNK
    if padding:
        r, log_w, k, v, a, b = (functional.pad(x, (0, 0, 0, padding)) for x in (r, log_w, k, v, a, b))
    chunks = (length + padding) // CHUNK
    r, log_w, k, v, a, b = (x.reshape(batch, heads, chunks, CHUNK, size) for x in (r, log_w, k, v, a, b))
    running = log_w.cumsum(dim=3)
    grown, shrunk = running.exp(), (-running).exp()
    r, a, b, k = r * grown, a * (running - log_w).exp(), b * shrunk, k * shrunk

    m = (a @ b.mT).tril(-1)
    eye = torch.eye(CHUNK, dtype=m.dtype)
    inverse, power = eye + m, m
    for _ in range(int(math.log2(CHUNK)) - 1):
        power = power @ power
        inverse = inverse + inverse @ power
    from_state = inverse @ a
    from_values = inverse @ ((a @ k.mT).tril(-1) @ v)
    added, last = v.mT @ k, grown[:, :, :, -1:, :]

    state = r.new_zeros(batch, heads, size, size)
    states, removed = [], []
    # unbind, not indexing: the gradient of an index is a full tensor of zeros each time
    for p_n, q_n, b_n, added_n, last_n in zip(*(x.unbind(2) for x in (from_state, from_values, b, added, last)), strict=True):
        states.append(state)
        u = p_n @ state.mT + q_n
        removed.append(u)
        state = (state + u.mT @ b_n + added_n) * last_n
    before, u = torch.stack(states, dim=2), torch.stack(removed, dim=2)
    y = r @ before.mT + (r @ b.mT).tril() @ u + (r @ k.mT).tril() @ v
    return y.reshape(batch, heads, chunks * CHUNK, size)[:, :, :length]


class TimeMix(nn.Module):
    """The attention-like half of a block (``att``)."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width, heads, size = config.n_embd, config.n_head, config.head_size
        self.layer, self.heads, self.size = layer, heads, size
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
            setattr(self, name, nn.Parameter(torch.empty(1, 1, width)))
        ranks = {"w": config.decay_lora, "a": config.a_lora, "g": config.gate_lora}
        if layer > 0:
            self.v0 = nn.Parameter(torch.empty(1, 1, width))
            ranks["v"] = config.v_lora
        for name, rank in ranks.items():
            setattr(self, f"{name}1", nn.Parameter(torch.empty(width, rank)))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(rank, width)))
        self.r_k = nn.Parameter(torch.empty(heads, size))
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ln_x = nn.GroupNorm(heads, width, eps=config.group_norm_epsilon)
        self.reset(config)

    @torch.no_grad()
    def reset(self, config: RWKV7Config) -> None:
        """The initialization of the reference training code."""
        width, size = config.n_embd, config.head_size
        depth = self.layer / max(1, config.n_layer - 1)
        rest = 1 - self.layer / config.n_layer
        index = torch.arange(width, dtype=torch.float32)
        for name, power in (("x_r", 0.2), ("x_w", 0.9), ("x_k", 0.7), ("x_v", 0.7), ("x_a", 0.9), ("x_g", 0.2)):
            getattr(self, name).copy_((1 - (index / width) ** (power * rest)).view(1, 1, -1))
        zigzag = ((index % size) - (size - 1) / 2) / ((size - 1) / 2)
        zigzag = zigzag * zigzag.abs()
        linear = index / (width - 1) - 0.5
        self.w0.copy_((-6 + 6 * (index / (width - 1)) ** (1 + depth**0.3) + 0.5 + zigzag * 2.5).view(1, 1, -1))
        self.a0.copy_((-0.19 + zigzag * 0.3 + linear * 0.4).view(1, 1, -1))
        self.k_k.copy_((0.71 - linear * 0.1).view(1, 1, -1))
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        names = ["w", "a", "g"]
        if self.layer > 0:
            self.v0.copy_((0.73 - linear * 0.4).view(1, 1, -1))
            names.append("v")
        for name in names:
            getattr(self, f"{name}1").zero_()
            nn.init.orthogonal_(getattr(self, f"{name}2"), gain=0.1)
        bound = 0.5 / math.sqrt(width)
        self.receptance.weight.uniform_(-bound, bound)
        self.key.weight.uniform_(-0.1 * bound, 0.1 * bound)
        self.value.weight.uniform_(-bound, bound)
        self.output.weight.zero_()

    def mix(self, x: torch.Tensor, shifted: torch.Tensor, v_first: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What the state update needs, from the input and the previous token's input; [B, T, C] each."""
        difference = shifted - x
        xr, xw, xk, xv, xa, xg = (x + difference * getattr(self, f"x_{name}") for name in "rwkvag")
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = -functional.softplus(-(self.w0 + torch.tanh(xw @ self.w1) @ self.w2)) - 0.5
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        kk = functional.normalize((k * self.k_k).unflatten(-1, (self.heads, self.size)).float(), dim=-1).flatten(-2)
        k = k * (1 + (a - 1) * self.k_a)
        return {"r": r, "log_w": -w.float().exp(), "k": k, "v": v, "a": -kk, "b": kk * a, "g": g, "v_first": v_first}

    def finish(self, y: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Group norm, the bonus for the current token, the gate and the output projection; y: [B, T, H, N]."""
        batch, length = y.shape[:2]
        r, k, v = (parts[name].float().unflatten(-1, (self.heads, self.size)) for name in ("r", "k", "v"))
        normed = self.ln_x(y.flatten(0, 1).flatten(1)).view(batch, length, -1)
        bonus = ((r * k * self.r_k).sum(dim=-1, keepdim=True) * v).flatten(-2)
        return self.output((normed + bonus) * parts["g"])

    def forward(self, x: torch.Tensor, v_first: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole sequences [B, T, C], from an empty state."""
        parts = self.mix(x, functional.pad(x, (0, 0, 1, -1)), v_first)
        with torch.autocast("cpu", enabled=False):
            heads = (
                parts[name].float().unflatten(-1, (self.heads, self.size)).transpose(1, 2) for name in ("r", "log_w", "k", "v", "a", "b")
            )
            y = wkv7_chunked(*heads).transpose(1, 2)
        return self.finish(y, parts), parts["v_first"]

    def step(
        self, x: torch.Tensor, v_first: torch.Tensor | None, shifted: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One token: x and shifted [B, C], state [B, H, N, N]; returns the output, v_first and the new state."""
        parts = self.mix(x.unsqueeze(1), shifted.unsqueeze(1), v_first)
        heads = (parts[name][:, 0].unflatten(-1, (self.heads, self.size)) for name in ("r", "log_w", "k", "v", "a", "b"))
        y, state = wkv7_step(state, *heads)
        return self.finish(y.unsqueeze(1), parts)[:, 0], parts["v_first"], state


class ChannelMix(nn.Module):
    """The feed-forward half of a block (``ffn``)."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width = config.n_embd
        self.x_k = nn.Parameter(torch.empty(1, 1, width))
        self.key = nn.Linear(width, config.ffn_size, bias=False)
        self.value = nn.Linear(config.ffn_size, width, bias=False)
        with torch.no_grad():
            self.x_k.copy_((1 - (torch.arange(width) / width) ** ((1 - layer / config.n_layer) ** 4)).view(1, 1, -1))
            bound = 0.5 / math.sqrt(width)
            self.key.weight.uniform_(-bound, bound)
            self.value.weight.zero_()

    def forward(self, x: torch.Tensor, shifted: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, C]; ``shifted`` is the previous token's input (by default from the sequence itself, zero at its start)."""
        if shifted is None:
            shifted = functional.pad(x, (0, 0, 1, -1))
        return self.value(torch.relu(self.key(x + (shifted - x) * self.x_k)) ** 2)


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.ln1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.ln2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)


class RWKV7(nn.Module):
    """The language model."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * math.sqrt(max(1.0, config.vocab_size / config.n_embd)))

    @classmethod
    def from_folder(cls, folder: Path) -> RWKV7:
        """Load ``config.json`` and ``model.safetensors``; the weights are converted to float32."""
        from safetensors.torch import load_file

        model = cls(RWKV7Config(**json.loads((folder / "config.json").read_text("utf-8"))))
        model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
        return model.eval()

    def config_json(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return asdict(self.config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocabulary] of whole sequences [B, T]."""
        x = self.blocks[0].ln0(self.emb(tokens))
        v_first = None
        for block in self.blocks:
            attended, v_first = block.att(block.ln1(x), v_first)
            x = x + attended
            x = x + block.ffn(block.ln2(x))
        return self.head(self.ln_out(x))

    def empty_state(self, batch: int) -> list[dict[str, torch.Tensor]]:
        """The state before the first token."""
        config = self.config
        return [
            {
                "att_shift": torch.zeros(batch, config.n_embd),
                "ffn_shift": torch.zeros(batch, config.n_embd),
                "wkv": torch.zeros(batch, config.n_head, config.head_size, config.head_size),
            }
            for _ in self.blocks
        ]

    def step(self, tokens: torch.Tensor, state: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """One token a sequence: tokens [B]; returns logits [B, vocabulary] and the new state."""
        x = self.blocks[0].ln0(self.emb(tokens))
        v_first, new = None, []
        for block, old in zip(self.blocks, state, strict=True):
            inner = block.ln1(x)
            attended, v_first, wkv = block.att.step(inner, v_first, old["att_shift"], old["wkv"])
            x = x + attended
            outer = block.ln2(x)
            x = x + block.ffn(outer.unsqueeze(1), old["ffn_shift"].unsqueeze(1))[:, 0]
            new.append({"att_shift": inner, "ffn_shift": outer, "wkv": wkv})
        return self.head(self.ln_out(x)), new
