"""`QuantizedConv`: a convolution of one, two or three axes whose weight is stored in codes."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from qcore.errors import SpecError
from qcore.modules.runtime import RuntimeModule
from qcore.modules.stored import StoredWeight, dtype_name, from_table, meta_bias, resolved
from qcore.numbers import QuantSpec, spec_from_dict, spec_to_dict
from qcore.numbers.granularity import Shape
from qcore.ops import quantize_input, static_parts
from qcore.ops.activation import PREFIX
from qcore.packing import Packing

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class QuantizedConv(StoredWeight, RuntimeModule):
    """Dequantizes the weight and convolves; the weight is a matrix [N, K/groups · kernel], as `Layout.matrix` gives it.

    geometry: "weight" (the shape of the float weight), "stride", "padding", "dilation", "groups", "padding_mode", as of nn.Conv1d, 2d, 3d.
    Quantized inputs are rows of channels, one for each position: per token is one scale a position, per tensor one for all.
    """

    name: ClassVar[str] = "quantized-conv"

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        spec: QuantSpec,
        shape: Shape,
        packing: Packing,
        geometry: Mapping[str, Any],
        *,
        bias: Tensor | None = None,
        activation: QuantSpec | None = None,
        activation_parts: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(parts, spec, shape, packing)
        self.geometry = dict(geometry)
        axes = len(self.geometry["weight"]) - 2
        if axes not in _CONV:
            raise SpecError(f"a convolution has 1 to 3 spatial axes, got a weight of shape {self.geometry['weight']}")
        for name, part in (activation_parts or {}).items():
            self._keep(PREFIX + name, part)
        self.activation = activation
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @staticmethod
    def geometry_of(module: Any) -> dict[str, Any]:
        """Of an nn.Conv1d, 2d or 3d, JSON-ready."""
        return {
            "weight": list(module.weight.shape),
            "stride": list(module.stride),
            "padding": module.padding if isinstance(module.padding, str) else list(module.padding),
            "dilation": list(module.dilation),
            "groups": module.groups,
            "padding_mode": module.padding_mode,
        }

    def forward(self, x: Tensor) -> Tensor:
        g = self.geometry
        axes = len(g["weight"]) - 2
        if self.activation is not None:
            rows = x.movedim(-1 - axes, -1)
            x = quantize_input(rows, self.activation, static_parts(self.stored())).movedim(-1, -1 - axes)
        weight = self.dequantize().reshape(g["weight"]).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        padding = g["padding"] if isinstance(g["padding"], str) else tuple(g["padding"])
        if g["padding_mode"] != "zeros":
            x = F.pad(x, self._sides(), mode=g["padding_mode"])
            padding = (0,) * axes
        return _CONV[axes](x, weight, bias, tuple(g["stride"]), padding, tuple(g["dilation"]), g["groups"])

    def _sides(self) -> list[int]:
        """Padding for F.pad: (before, after) of each axis, the last axis first; "same" is uneven for even kernels."""
        g = self.geometry
        kernel = g["weight"][2:]
        if g["padding"] == "valid":
            pairs = [(0, 0) for _ in kernel]
        elif g["padding"] == "same":
            totals = [d * (k - 1) for d, k in zip(g["dilation"], kernel, strict=True)]
            pairs = [(t // 2, t - t // 2) for t in totals]
        else:
            pairs = [(p, p) for p in g["padding"]]
        return [side for pair in reversed(pairs) for side in pair]

    def config(self) -> dict[str, Any]:
        return self.stored_config() | {
            "geometry": self.geometry,
            "bias": None if self.bias is None else dtype_name(self.bias.dtype),
            "activation": None if self.activation is None else spec_to_dict(self.activation),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], registry: Any = None) -> Self:
        registry = resolved(registry)
        arguments = cls.stored_arguments(config, registry)
        activation = config["activation"]
        return cls(
            **arguments,
            geometry=config["geometry"],
            bias=meta_bias(config["bias"], config["shape"][0]),
            activation=None if activation is None else spec_from_dict(activation, registry.formats),
            activation_parts={k.removeprefix(PREFIX): t for k, t in from_table(config["parts"]).items() if k.startswith(PREFIX)},
        )

    def extra_repr(self) -> str:
        g = self.geometry
        return f"weight={g['weight']}, stride={g['stride']}, padding={g['padding']}, groups={g['groups']}, {self.storage_repr()}"
