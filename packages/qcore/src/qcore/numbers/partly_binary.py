"""`PartlyBinary`: two numbers for most values of a block, and 8-bit integers for the few that matter."""

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers.formats import NO_PARAMS, NumberFormat, Params
from qcore.numbers.granularity import Shape

ZERO = 129  # the code of a salient zero


@dataclass(frozen=True)
class PartlyBinary(NumberFormat):
    """mean ± spread for most values of a block, integers times a step for a share of them: those that are salient.

    Codes 0 and 1 are mean - spread and mean + spread; a code c from 2 on is the salient number (c - 129)·step, -127 … 126 steps.  At most the share
    `salient` of a tensor's values has salient codes: `encode` gives them to the values that gain most, a solver to those that count most, and the
    packing `partly-binary` stores all others in a bit.  So `encode` is nearest only among what that share allows.

    salient: share of the values with 8 bits, below 1

    Mean and spread are those of the values that are not salient; the released code averages over the zeros in the places of the salient ones too,
    which costs 2 dB where half of the values are salient.
    Source: PB-LLM, https://arxiv.org/abs/2310.00034, section 3
    """

    name: ClassVar[str] = "partly-binary"
    salient: float = 0.1

    bits = 8
    per_block = True
    parts = ("mean", "spread", "step")
    lo = -1.0
    hi = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.salient < 1:
            raise SpecError(f"the share of salient values is 0 or more and below 1, got salient={self.salient}")

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def count(self, values: int) -> int:
        """How many of so many values may be salient."""
        return int(self.salient * values + 1e-9)

    def fit(self, x: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        x = x.float()
        size = x.abs() if weight is None else torch.where(weight > 0, x.abs(), -1.0)
        return self.fit_around(x, topmost(size, self.count(x.numel())), None if weight is None else weight > 0)

    def fit_around(self, x: Tensor, salient: Tensor, counts: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of blocks [..., n] whose salient values are known: least squares for all others.

        salient: [..., n] bool;  counts: [..., n] bool, False for values that are only there to fill up a block
        """
        x = x.double()
        salient = salient if counts is None else salient & counts
        rest = (~salient if counts is None else ~salient & counts).double()
        n = rest.sum(-1).clamp(min=1)
        mean = ((x * rest).sum(-1) / n).half()
        spread = (((x - mean.double().unsqueeze(-1)).abs() * rest).sum(-1) / n).half()
        ideal = (x.abs() * salient).amax(-1) / (255 - ZERO)
        step = ideal.half()
        # rounded up: a step that became smaller would clip the largest value
        step = torch.where(step.double() < ideal, torch.nextafter(step, torch.full_like(step, torch.inf)), step)
        if not all(torch.isfinite(t).all() for t in (mean, spread, step)):
            raise SpecError(f"{self.name}: weights of {float(x.abs().max()):.4g} do not fit its float16 means and steps (largest 65504)")
        return {"mean": mean, "spread": spread, "step": step}

    def encode(self, x: Tensor, params: Params = NO_PARAMS) -> Tensor:
        codes, levels = self.binary(x, params), self.levels(x, params)
        loss = [(x.float() - self.decode(c, params)).square() for c in (codes, levels)]
        gain = loss[0] - loss[1]
        return torch.where(topmost(gain, self.count(x.numel())) & (gain > 0), levels, codes)

    def binary(self, x: Tensor, params: Params) -> Tensor:
        """The nearer one of a block's two numbers."""
        return (x.float() >= self._part("mean", params)).to(torch.uint8)

    def levels(self, x: Tensor, params: Params) -> Tensor:
        """The nearest salient number."""
        step = self._part("step", params)
        level = x.float() / torch.where(step > 0, step, torch.inf)
        return (level.round().clamp(2 - ZERO, 255 - ZERO) + ZERO).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params = NO_PARAMS) -> Tensor:
        c = codes.float()
        mean, spread, step = (self._part(name, params) for name in self.parts)
        return torch.where(codes < 2, mean + (2 * c - 1) * spread, (c - ZERO) * step)

    def _part(self, name: str, params: Params) -> Tensor:
        if name not in params:
            raise SpecError(f"{self} needs its fitted parts {', '.join(self.parts)}; call `fit`, or `quantize`, which does")
        return params[name].float()


def topmost(x: Tensor, count: int) -> Tensor:
    """Which entries are the `count` largest of all.  → bool, x's shape"""
    chosen = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    chosen[x.flatten().topk(count).indices] = True
    return chosen.view(x.shape)


def effective_bits(fmt: PartlyBinary, shape: Shape, cols: int) -> tuple[float, float]:
    """Stored bits per value of a matrix with tiles of 1 × `cols`: with a bit for each value that says whether it is salient, as the packing has it;
    and with that mask coded at its entropy, which no packing here does."""
    n, k = shape
    f = sum(fmt.count(n * min(cols, k - a)) for a in range(0, k, cols)) / (n * k)
    rest = 8 * f + (1 - f) + 48 * -(-k // cols) / k
    entropy = 0.0 if f == 0 else -f * log2(f) - (1 - f) * log2(1 - f)
    return rest + 1, rest + entropy
