"""What comes out of a state-space recurrence, y = h·C, as a module: both factors can be observed, smoothed, rotated and quantized there."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from qcore.errors import SpecError
from qcore.model.tap import tap
from qcore.modules.hadamard import OnlineHadamard
from qcore.numbers.hadamard import core_size, hadamard, transform
from torch import Tensor, nn

CHUNK = 32  # tokens whose states are held at once


class Readout(nn.Module):
    """y_d = Σ_n h_dn C_n.  h: [B, T, D, N]; c: [B, T, G, N], where G groups of D/G channels read a C of their own → [B, T, D]

    Sites: "h" sees rows [D·N] of one token each, "c" rows [G·N].
    """

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = tap(self, "h", h.flatten(-2)).view(h.shape)
        c = tap(self, "c", c.flatten(-2)).view(c.shape)
        return self.multiply(h, c)

    def multiply(self, h: Tensor, c: Tensor) -> Tensor:
        grouped = h.unflatten(2, (c.shape[2], -1))  # [B, T, G, D/G, N]
        return (grouped @ c.unsqueeze(-1)).squeeze(-1).flatten(2)


class RotatedReadout(Readout):
    """The same product with easier factors: channels are divided by `scale` and rotated before, and come back afterwards; states are rotated.

        h' = (diag(1/scale) h) rotated over channels by R3 and over states by R4;  y = scale ∘ (R3ᵀ (h' C'))

    C' = C·R4 comes out of the rewritten x_proj already.  MambaQuant's S3, R3 and R4.
    Source: https://arxiv.org/abs/2501.13484, section 4.3

    scale: [D], a buffer
    """

    name: ClassVar[str] = "rotated-readout"
    scale: Tensor

    def __init__(self, channels: int, states: int, *, rotate_channels: bool = True, rotate_states: bool = True) -> None:
        super().__init__()
        self.channels, self.states = channels, states
        for size, wanted, what in ((channels, rotate_channels, "channels"), (states, rotate_states, "states")):
            if wanted and core_size(size) is None:
                raise SpecError(f"no Hadamard matrix of size {size} is known: the {what} of h·C cannot be rotated; leave rotate_{what} off")
        self.over_channels = OnlineHadamard(channels, channels) if rotate_channels else None
        self.over_states = OnlineHadamard(states, states) if rotate_states else None
        self.register_buffer("scale", torch.ones(channels))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        if c.shape[2] != 1:
            raise SpecError(f"a rotation over all channels needs one C for all of them, got {c.shape[2]} groups")
        h = h / self.scale.to(h.dtype).unsqueeze(-1)
        if self.over_channels is not None:
            h = self.over_channels(h.mT).mT
        if self.over_states is not None:
            h = self.over_states(h)
        y = super().forward(h, c)
        if self.over_channels is not None:
            y = hadamard_inverse(y, self.over_channels.signs)
        return y * self.scale.to(y.dtype)

    def config(self) -> dict[str, Any]:
        return {
            "channels": self.channels,
            "states": self.states,
            "rotate_channels": self.over_channels is not None,
            "rotate_states": self.over_states is not None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        c = dict(config)
        return cls(c["channels"], c["states"], rotate_channels=c["rotate_channels"], rotate_states=c["rotate_states"])


def hadamard_inverse(y: Tensor, signs: Tensor) -> Tensor:
    """Undo x → (x ∘ signs)·Hᵀ along the last axis, without making H = H_k ⊗ H_{2^a}: the second factor is symmetric, the first is small."""
    n = y.shape[-1]
    k = core_size(n)
    assert k is not None, n
    blocks = transform(y.unflatten(-1, (k, n // k)))
    return torch.einsum("...ka,kj->...ja", blocks, hadamard(k).to(y)).flatten(-2) * signs.to(y.dtype)


class SmoothSiLU(nn.Module):
    """x·σ(s ∘ x): SiLU behind a projection whose channels were divided by s, which the reader multiplies back.  s: [C], a buffer

    With x = z/s: s · (x·σ(s·x)) = z·σ(z) = SiLU(z).
    Source: https://arxiv.org/abs/2501.13484, section 4.3 (S-SiLU)
    """

    name: ClassVar[str] = "smooth-silu"
    s: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("s", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.s.to(x.dtype))

    def config(self) -> dict[str, Any]:
        return {"channels": self.s.shape[0]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["channels"])


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, readout: nn.Module, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t,  y_t = readout(h_t, C_t); a few tokens at a time, so that few states are held.

    u, delta: [B, T, D];  A: [D, N], negative;  B, C: [B, T, G, N];  start: [B, D, N], None = zeros
    return:   y [B, T, D], the last state
    """
    batch, length, channels = u.shape
    h = u.new_zeros(batch, channels, A.shape[1]) if start is None else start.to(u.dtype)
    outputs = []
    for a in range(0, length, CHUNK):
        step = slice(a, a + CHUNK)
        decay = torch.exp(delta[:, step].unsqueeze(-1) * A)
        added = (delta[:, step] * u[:, step]).unflatten(2, (B.shape[2], -1)).unsqueeze(-1) * B[:, step].unsqueeze(3)  # [B, t, G, D/G, N]
        states = []
        for decay_t, added_t in zip(decay.unbind(1), added.flatten(2, 3).unbind(1), strict=True):
            h = decay_t * h + added_t
            states.append(h)
        outputs.append(readout(torch.stack(states, 1), C[:, step]))
    return torch.cat(outputs, 1), h
