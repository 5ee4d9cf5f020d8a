"""Element-wise weights, y = x ⊙ μ: RWKV's mixing vectors.  A module of their own, so that they can be observed, solved and stored as any weight.

The parameter is called `mu`, not `weight`: recipes for matrices ("*:weight") do not mean it.  A solver sees it as a matrix [1, C], and what it is
multiplied with under "mu.input"; no channel reaches another, so nothing can compensate a rounding error elsewhere and GPTQ has no place here.
"""

from typing import Any, ClassVar, Self

import torch
from qcore.errors import SpecError
from qcore.model.tap import tap
from qcore.modules import RuntimeModule, StoredWeight
from qcore.modules.replace import Pieces, register_stack
from qcore.modules.stored import resolved
from torch import Tensor, nn


class Elementwise(nn.Module):
    """y = x ⊙ μ.  x: [..., C]"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return tap(self, "mu.input", x) * self.mu


class QuantizedElementwise(StoredWeight, RuntimeModule):
    """y = x ⊙ μ̂, with μ̂ [1, C] in packed parts."""

    name: ClassVar[str] = "quantized-elementwise"

    def forward(self, x: Tensor) -> Tensor:
        return tap(self, "mu.input", x) * self.dequantize().flatten().to(x.dtype)

    def config(self) -> dict[str, Any]:
        return self.stored_config()

    @classmethod
    def from_config(cls, config: dict[str, Any], registry: Any = None) -> Self:
        return cls(**cls.stored_arguments(config, resolved(registry)))


def _quantized(module: nn.Module, pieces: Pieces) -> nn.Module:
    stored = pieces[("mu", None)]
    if stored.activation is not None:
        raise SpecError("the input of an element-wise weight stays float; drop the rule for its mu.input")
    return QuantizedElementwise(**stored.arguments())


register_stack(lambda module: isinstance(module, Elementwise), _quantized)
