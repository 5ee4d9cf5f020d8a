"""AdamW with states in float32 or in 8 bits.

In 8 bits both moments are minifloats (E4M3) under one float32 scale for 256 of them, the second as its square root, which halves its exponents.
They are rounded stochastically: a second moment moves by a thousandth in a step, far less than what separates two such numbers, and rounding
to the nearest would hold it where it is for ever.

The formats are our choice, not a paper's: 8-bit optimizers (https://arxiv.org/abs/2110.02861) take fitted tables of 256 numbers in blocks of 2,048.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qcore.errors import CheckpointError, SpecError
from qcore.numbers import FP8_E4M3, QTensor, QuantSpec, Tile
from qcore.numbers.granularity import block_range
from qcore.numbers.tensor import normalize, scale_parts

STATE = QuantSpec(format=FP8_E4M3, granularity=Tile(1, 256))
_LOWEST = -6  # exponent of E4M3's smallest normal number


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """betas, eps, decay: of AdamW (https://arxiv.org/abs/1711.05101);  state_bits: of one moment, 32 or 8"""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    state_bits: Literal[32, 8] = 32

    def __post_init__(self) -> None:
        if not all(0 <= b < 1 for b in self.betas) or self.eps <= 0 or self.decay < 0:
            raise SpecError(f"AdamW wants betas in [0, 1), eps above 0 and a decay of 0 or more, got {self.betas}, {self.eps} and {self.decay}")
        if self.state_bits not in (32, 8):
            raise SpecError(f"optimizer states have 32 or 8 bits, got {self.state_bits}")


class AdamW:
    """Moments of named parameters, and the step that they give."""

    def __init__(self, parameters: Mapping[str, Tensor], settings: AdamWSettings) -> None:
        self.parameters, self.settings = dict(parameters), settings
        self.count = 0
        self._state: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            for moment in ("first", "second"):
                self._put(name, moment, torch.zeros_like(p, dtype=torch.float32), None)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rate: float, generator: torch.Generator | None = None) -> None:
        """Change the parameters in place.  generator: rounds the states, where they have 8 bits"""
        s, self.count = self.settings, self.count + 1
        c1, c2 = (1 - beta**self.count for beta in s.betas)
        for name, p in self.parameters.items():
            g = gradients[name].float()
            first = self._get(name, "first").lerp_(g, 1 - s.betas[0])
            second, least = self._second(name)
            second = second.mul_(s.betas[1]).addcmul_(g, g, value=1 - s.betas[1])
            self._put(name, "first", first, generator)
            self._put(name, "second", second, generator)
            below = torch.maximum((second / c2).sqrt_(), least).add_(s.eps)
            p.mul_(1 - rate * s.decay).sub_(rate / c1 * first / below)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, but for the parameters."""
        return dict(self._state) | {"count": torch.tensor(self.count)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """CheckpointError where the state is of other parameters, or of other bits."""
        found = dict(state)
        count = found.pop("count", None)
        if count is None or {k: (t.shape, t.dtype) for k, t in found.items()} != {k: (t.shape, t.dtype) for k, t in self._state.items()}:
            raise CheckpointError("the optimizer's state is of other parameters or other bits; go on with the settings that it was written with")
        self.count, self._state = int(count), found

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._state.values())

    # moments as they are kept ----------------------------------------------------------------------------------------------------------------

    def _put(self, name: str, moment: str, value: Tensor, generator: torch.Generator | None) -> None:
        key = f"{name}/{moment}"
        if self.settings.state_bits == 32:
            self._state[key] = value
            return
        flat = (value.sqrt() if moment == "second" else value).reshape(1, -1)
        for part, t in _rounded(flat, generator).parts.items():
            self._state[f"{key}.{part}"] = t

    def _get(self, name: str, moment: str) -> Tensor:
        key, p = f"{name}/{moment}", self.parameters[name]
        if self.settings.state_bits == 32:
            return self._state[key]
        return self._coded(key, p).dequantize().reshape(p.shape)

    def _coded(self, key: str, p: Tensor) -> QTensor:
        return QTensor(STATE, {part: self._state[f"{key}.{part}"] for part in ("codes", "scale")}, (1, p.numel()))

    def _second(self, name: str) -> tuple[Tensor, Tensor]:
        """The second moment, and the smallest root of one that is told from zero: nothing is divided by less."""
        value = self._get(name, "second")
        if self.settings.state_bits == 32:
            return value, torch.zeros(())
        scale = self._coded(f"{name}/second", value).scale().repeat_interleave(256, 1)[:, : value.numel()]
        return value.square_(), (scale * 2.0 ** (_LOWEST - 3)).reshape(value.shape)


def _rounded(x: Tensor, generator: torch.Generator | None) -> QTensor:
    """x [1, n] in E4M3, by chance up or down so that the mean is x (but at powers of two); to the nearest without a generator."""
    parts = scale_parts(*block_range(x, STATE.granularity.block(tuple(x.shape))), STATE)
    z = normalize(x, STATE, parts)
    if generator is not None:
        _, e = torch.frexp(z)
        ulp = torch.ldexp(torch.ones_like(z), (e - 1).clamp(min=_LOWEST) - 3)
        z = z + (torch.rand(z.shape, generator=generator) - 0.5) * ulp
    return QTensor(STATE, {"codes": STATE.format.encode(z), **parts}, (1, x.shape[1]))
