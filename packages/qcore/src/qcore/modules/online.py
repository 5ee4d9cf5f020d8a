"""A float leaf with a module before it: how a rewritten model runs in memory before anything is quantized."""

from torch import Tensor, nn


class Online(nn.Module):
    """y = leaf(before(x)).

    Never in a checkpoint: a quantized leaf holds the module before it itself (`QuantizedLinear.online`).  What is observed as the site's input is the
    input of `leaf`: exactly what will be coded.
    """

    def __init__(self, leaf: nn.Module, before: nn.Module) -> None:
        super().__init__()
        self.leaf = leaf
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return self.leaf(self.before(x))
