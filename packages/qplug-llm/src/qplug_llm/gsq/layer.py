"""A frozen linear layer with a low-rank adapter beside it."""

import math

import torch
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.modules.linear import QuantizedLinear
from qcore.training.trainer import seeded
from torch import Tensor, nn

from qplug_llm.gsq.step import FLOAT, Dither, FrozenWeight, LowRankStep, Numbers, SharedInputs, Surroundings, Tally


class GSQLinear(nn.Module):
    """y = W x + scaling · B A x + bias, W as `leaf` stores it.

    leaf:     the layer that it stands for: one of qcore's quantized ones, or a float one; its parameters are not trained
    lora_A:   [rank, in] float32, uniform as a linear layer's weights are;  lora_B: [out, rank] float32, zero: at first the layer is the leaf
    numbers:  of the products; may be exchanged at any time (`FLOAT`: adapters over a quantized weight, as other programs run them)
    hold:     see `FrozenWeight`
    """

    def __init__(
        self,
        leaf: nn.Module,
        rank: int,
        alpha: float,
        numbers: Numbers = FLOAT,
        *,
        seed: tuple[int, ...] = (0,),
        shared: SharedInputs | None = None,
        dither: Dither | None = None,
        hold: bool = False,
    ) -> None:
        super().__init__()
        if rank < 1 or not alpha > 0:
            raise SpecError(f"an adapter has a rank of at least 1 and a positive alpha, got {rank} and {alpha}")
        out, into = shape_of(leaf)
        self.leaf = leaf
        self.rank, self.scaling, self.numbers = rank, alpha / rank, numbers
        bound = 1 / math.sqrt(into)
        self.lora_A = nn.Parameter(torch.rand(rank, into, generator=seeded(*seed)) * 2 * bound - bound)
        self.lora_B = nn.Parameter(torch.zeros(out, rank))
        self.shared = SharedInputs(Tally()) if shared is None else shared
        self.dither = Dither() if dither is None else dither
        self._frozen = FrozenWeight(self.base, hold=hold)

    def base(self) -> Tensor:
        """The frozen weight's values.  [out, in]"""
        return matrix_of(self.leaf)

    def merged(self) -> Tensor:
        """The values of weight and adapter together.  [out, in]"""
        with torch.no_grad():
            return torch.addmm(self.base(), self.lora_B, self.lora_A, alpha=self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        coded = self.shared.of(x, self.numbers)
        around = Surroundings(self._frozen, self.numbers, self.scaling, self.shared.tally, self.dither, torch.is_grad_enabled())
        y: Tensor = LowRankStep.apply(x.reshape(-1, x.shape[-1]), self.lora_A, self.lora_B, coded, around)
        bias = getattr(self.leaf, "bias", None)
        y = y.unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, activation={self.numbers.activation}, gradient={self.numbers.gradient}"


def shape_of(leaf: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; SpecError where a layer is none."""
    if isinstance(leaf, QuantizedLinear):
        if leaf.activation is not None or leaf.online is not None:
            raise SpecError("an adapted layer has no quantized input or online transform of its own: the recipe's rule for inputs says how it runs")
        return leaf.out_features, leaf.in_features
    weight = getattr(leaf, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(leaf, nn.Embedding):
        raise SpecError(f"{type(leaf).__name__} is no linear layer with a matrix of its own")
    out, into = layout(leaf).matrix(weight).shape
    return out, into


def matrix_of(leaf: nn.Module) -> Tensor:
    """The weight's values [out, in]."""
    if isinstance(leaf, QuantizedLinear):
        return leaf.dequantize()
    assert isinstance(leaf.weight, Tensor)
    return layout(leaf).matrix(leaf.weight.detach())
