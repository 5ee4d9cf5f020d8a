"""Mamba's mixer with every tensor within reach.

transformers' mixers read `conv1d.weight` and `dt_proj.weight` themselves and multiply h·C inside a function: no hook fires there and no leaf can be
replaced.  This mixer has the same parameters under the same names, and calls every one of them as a module.  One class serves Mamba, FalconMamba
(norms without gain on Δ, B and C), Jamba (with gain), and blocks that read their sequence in both directions:

    [x; z] = in_proj(input);  x = SiLU(conv1d(x));  [δ; B; C] = x_proj(x);  Δ = softplus(dt_proj(δ));
    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t;  y = h·C + D x;  out_proj(y ∘ SiLU(z))

A cached decode goes on from the cached convolution inputs and state, for one token or many; transformers starts from an empty state for many.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from qcore.errors import SpecError
from torch import Tensor, nn

from qplug_ssm.precision import wide
from qplug_ssm.readout import Readout, scan

PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "A_log", "D")
Directions = Literal["forward", "both", "mirror"]


class SelectiveMixer(nn.Module):
    """One mixer, made of the parts of another (`adopt`) or of fresh ones (`fresh`).

    rank, states: sizes of Δ's low-rank map and of the state
    directions:   "forward"; "both": a second set of parts with names in `_b` reads the sequence backwards (Vim);
                  "mirror": the same parts read it backwards too, after one convolution (typeseg)
    delta_floor:  added to Δ
    divide:       what the sum of both directions is divided by (Vim's if_divide_out: 2)
    """

    in_proj: nn.Linear
    out_proj: nn.Linear
    A_log: Tensor
    D: Tensor

    def __init__(self, *, rank: int, states: int, directions: Directions = "forward", delta_floor: float = 0.0, divide: float = 1.0) -> None:
        super().__init__()
        self.rank, self.states, self.directions = rank, states, directions
        self.delta_floor, self.divide, self.layer_idx = delta_floor, divide, 0

    @classmethod
    def adopt(cls, other: nn.Module, *, rank: int, states: int, directions: Directions = "forward", divide: float = 1.0) -> "SelectiveMixer":
        """A mixer of the parameters and submodules of `other`, under their names."""
        mixer = cls(rank=rank, states=states, directions=directions, divide=divide)
        for name, module in other.named_children():
            mixer.add_module(name, module)
        for name, param in other.named_parameters(recurse=False):
            mixer.register_parameter(name, param)
        mixer.layer_idx = getattr(other, "layer_idx", 0) or 0
        if hasattr(other, "layer_type"):
            mixer.layer_type = other.layer_type
        return mixer._complete().train(other.training)

    @classmethod
    def fresh(
        cls, width: int, inner: int, *, rank: int, states: int, kernel: int = 4, directions: Directions = "forward", bias: bool = False,
        x_bias: bool = False, same: bool = False, delta_floor: float = 0.0,
    ) -> "SelectiveMixer":  # fmt: skip
        """A mixer with parameters of its own, not initialized.  same: the convolution looks to both sides; else to the past alone"""
        mixer = cls(rank=rank, states=states, directions=directions, delta_floor=delta_floor)
        mixer.in_proj, mixer.out_proj = nn.Linear(width, 2 * inner, bias=bias), nn.Linear(inner, width, bias=bias)
        for tail in mixer._tails:
            conv = nn.Conv1d(inner, inner, kernel, groups=inner, padding="same" if same else kernel - 1)
            mixer.add_module(f"conv1d{tail}", conv)
            mixer.add_module(f"x_proj{tail}", nn.Linear(inner, rank + 2 * states, bias=x_bias))
            mixer.add_module(f"dt_proj{tail}", nn.Linear(rank, inner))
            mixer.register_parameter(a_log(tail), nn.Parameter(torch.zeros(inner, states)))
            mixer.register_parameter(f"D{tail}", nn.Parameter(torch.ones(inner)))
        return mixer._complete()

    def _complete(self) -> "SelectiveMixer":
        if not isinstance(self._modules.get("act"), nn.Module):
            self.act = nn.SiLU()
        self.gate_act = nn.SiLU()
        for tail in self._tails:
            self.add_module(f"readout{tail}", Readout())
        if self.directions == "mirror":
            self.readout_mirror = Readout()
        return self

    @property
    def _tails(self) -> tuple[str, ...]:
        return ("", "_b") if self.directions == "both" else ("",)

    @property
    def readouts(self) -> tuple[str, ...]:
        """Names of the modules that multiply h by C."""
        return ("readout", "readout_mirror") if self.directions == "mirror" else tuple(f"readout{tail}" for tail in self._tails)

    def forward(self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """[B, T, width] → [B, T, width]; a cache is transformers' own, brought up to date in place."""
        if cache_params is not None and self.directions != "forward":
            raise SpecError("a mixer that reads its sequence in both directions has no step-by-step decode; leave the cache out")
        mask = attention_mask if attention_mask is not None and attention_mask.shape[0] > 1 and attention_mask.shape[1] > 1 else None
        x, z = self.in_proj(_masked(hidden_states, mask)).chunk(2, -1)
        y = self._direction(x, "", cache_params, mask)
        if self.directions == "both":
            y = (y + self._direction(x.flip(1), "_b", None, None if mask is None else mask.flip(1)).flip(1)) / self.divide
        return self.out_proj(y * self.gate_act(z))

    def _direction(self, x: Tensor, tail: str, cache: Any, mask: Tensor | None) -> Tensor:
        """The recurrence of one set of parts.  [B, T, D] → [B, T, D]"""
        start = self._cached_state(cache)
        x = _masked(self.act(self._convolved(x, getattr(self, f"conv1d{tail}"), cache)), mask)
        delta, B, C = getattr(self, f"x_proj{tail}")(x).split([self.rank, self.states, self.states], -1)
        if "dt_layernorm" in self._modules:
            delta, B, C = self.dt_layernorm(delta), self.b_layernorm(B), self.c_layernorm(C)  # type: ignore[operator]
        step = F.softplus(wide(getattr(self, f"dt_proj{tail}")(delta))) + self.delta_floor
        A = -torch.exp(wide(getattr(self, a_log(tail))))
        u, B, C = wide(x), wide(B).unsqueeze(2), wide(C).unsqueeze(2)
        with torch.autocast("cpu", enabled=False):
            y, last = scan(u, step, A, B, C, getattr(self, f"readout{tail}"), start)
            if self.directions == "mirror":
                back, _ = scan(u.flip(1), step.flip(1), A, B.flip(1), C.flip(1), self.readout_mirror)
                y = y + back.flip(1) + u * wide(self.D)
            y = y + u * wide(getattr(self, f"D{tail}"))
        if cache is not None:
            cache.update_recurrent_state(last, self.layer_idx)
        return y.to(x.dtype)

    def _convolved(self, x: Tensor, conv: nn.Module, cache: Any) -> Tensor:
        length = x.shape[1]
        past = x.mT
        if cache is not None:
            past = cache.update_conv_state(past, self.layer_idx, conv_kernel_size=conv.kernel_size[0])  # type: ignore[index]
        # what a causal convolution puts out beyond its input saw padding on the right
        return conv(past)[..., : past.shape[-1]][..., -length:].mT

    def _cached_state(self, cache: Any) -> Tensor | None:
        if cache is None:
            return None
        state = cache.get_recurrent_state(self.layer_idx, state_idx=0)
        if state is not None and cache.get_conv_state(self.layer_idx, state_idx=0) is None:
            raise SpecError(
                f"the cache of layer {self.layer_idx} holds a state but no convolution inputs: the first tokens after it would be convolved with "
                "zeros; fill it with a forward pass of this model (use_cache=True)"
            )
        return state


def a_log(tail: str) -> str:
    """Vim calls the backward A_log `A_b_log`."""
    return "A_b_log" if tail else "A_log"


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Padding is zero: it would enter the convolution and the state."""
    return x if mask is None else x * mask[:, -x.shape[1] :, None].to(x.dtype)


def looks_like_mixer(module: nn.Module, parts: Sequence[str] = PARTS) -> bool:
    """Whether a module is a Mamba mixer, by its parts."""
    return all(getattr(module, name, None) is not None for name in parts) and getattr(module.A_log, "ndim", 0) == 2


def adopted(module: Any) -> SelectiveMixer:
    """Our mixer of the parts of a transformers' or Vim mixer."""
    states = int(module.A_log.shape[1])
    rank = int(module.dt_proj.in_features)
    both = getattr(module, "conv1d_b", None) is not None
    divide = 2.0 if both and getattr(module, "if_divide_out", False) else 1.0
    return SelectiveMixer.adopt(module, rank=rank, states=states, directions="both" if both else "forward", divide=divide)
