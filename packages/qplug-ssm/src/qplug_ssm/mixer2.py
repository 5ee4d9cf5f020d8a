"""Mamba-2's mixer with every tensor within reach: transformers' parameters and names, every one of them called as a module.

    [z; x; B; C; δ] = in_proj(input);  [x; B; C] = SiLU(conv1d([x; B; C]));  Δ = softplus(δ + dt_bias), one for each head;
    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t;  y = h·C + D x;  out_proj(norm(y ∘ SiLU(z)))

The scan goes token by token, as Mamba-1's: the sums are those of the definition, not of the chunked matrix form that transformers runs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qplug_ssm.mixer import SelectiveMixer, _masked
from qplug_ssm.precision import wide
from qplug_ssm.readout import Readout, scan


class HeadMixer(SelectiveMixer):
    """A mixer of the parts of transformers' Mamba2Mixer."""

    conv1d: nn.Conv1d
    norm: nn.Module
    dt_bias: Tensor

    def __init__(self, other: Any) -> None:
        super().__init__(rank=0, states=other.ssm_state_size)
        for name, module in other.named_children():
            self.add_module(name, module)
        for name, param in other.named_parameters(recurse=False):
            self.register_parameter(name, param)
        self.heads, self.groups, self.inner = other.num_heads, other.n_groups, other.intermediate_size
        self.limit: tuple[float, float] = tuple(other.time_step_limit)
        self.layer_idx = other.layer_idx
        self.layer_type = getattr(other, "layer_type", None)
        self.readout = Readout()
        self.train(other.training)

    def forward(self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        mask = attention_mask if attention_mask is not None and attention_mask.shape[0] > 1 and attention_mask.shape[1] > 1 else None
        start = self._cached_state(cache_params)
        wide_dim = self.groups * self.states
        z, mixed, delta = self.in_proj(_masked(hidden_states, mask)).split([self.inner, self.inner + 2 * wide_dim, self.heads], -1)
        mixed = _masked(self.act(self._convolved(mixed, self.conv1d, cache_params)), mask)
        x, B, C = mixed.split([self.inner, wide_dim, wide_dim], -1)
        step = F.softplus(wide(delta) + wide(self.dt_bias)).clamp(*self.limit)
        size = self.inner // self.heads
        # every channel of a head shares its Δ, A and D
        A = -torch.exp(wide(self.A_log)).repeat_interleave(size).unsqueeze(1).expand(-1, self.states)
        u, B, C = wide(x), wide(B).unflatten(-1, (self.groups, -1)), wide(C).unflatten(-1, (self.groups, -1))
        with torch.autocast("cpu", enabled=False):
            h = None if start is None else start.flatten(1, 2)
            y, last = scan(u, step.repeat_interleave(size, -1), A, B, C, self.readout, h)
            y = y + u * wide(self.D).repeat_interleave(size)
        if cache_params is not None:
            cache_params.update_recurrent_state(last.unflatten(1, (self.heads, size)), self.layer_idx)
        return self.out_proj(self.norm(y.to(hidden_states.dtype), z))


def looks_like_head_mixer(module: nn.Module) -> bool:
    """Whether a module is transformers' Mamba-2 mixer, by its parts."""
    names = ("in_proj", "conv1d", "out_proj", "dt_bias", "norm", "n_groups")
    return all(getattr(module, n, None) is not None for n in names) and not hasattr(module, "x_proj")
