"""The sum of two leaves that stand for one."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qcore.modules.leaves import build_leaf, leaf_config


class Sum(nn.Module):
    """y = coarse(x) + fine(x): one layer whose weight was split, each part with a spec of its own.

    Coarse and fine weight splitting (a 1 × 1 convolution beside the 3 × 3), low-rank corrections, single channels kept apart: all are this module.
    Its children are ordinary leaves, quantized in place like any other.

    fine_channels: the input channels that `fine` reads; None: all of them.  [k]
    channel_axis:  where the channels lie in x: -1 for linear layers, 1 for convolutions
    """

    name: ClassVar[str] = "sum"
    fine_channels: Tensor | None

    def __init__(self, coarse: nn.Module, fine: nn.Module, fine_channels: Tensor | None = None, channel_axis: int = -1) -> None:
        super().__init__()
        self.coarse = coarse
        self.fine = fine
        self.channel_axis = channel_axis
        self._leaves = {"coarse": leaf_config(coarse), "fine": leaf_config(fine)}  # the children may be replaced by quantized ones
        self.register_buffer("fine_channels", fine_channels)

    def forward(self, x: Tensor) -> Tensor:
        apart = x if self.fine_channels is None else x.index_select(self.channel_axis, self.fine_channels)
        return self.coarse(x) + self.fine(apart)

    def config(self) -> dict[str, Any]:
        channels = None if self.fine_channels is None else self.fine_channels.shape[0]
        return {**self._leaves, "fine_channels": channels, "channel_axis": self.channel_axis}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        n = config["fine_channels"]
        channels = None if n is None else torch.zeros(n, dtype=torch.long)
        return cls(build_leaf(config["coarse"]), build_leaf(config["fine"]), channels, config["channel_axis"])
