"""`QuantizedConv`: a convolution of one, two or three axes whose weight is stored in codes."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qcore.errors import SpecError
from qcore.modules.runtime import RuntimeModule
from qcore.modules.stored import StoredWeight, dtype_name, from_table, meta_bias, resolved
from qcore.numbers import QuantSpec, spec_from_dict, spec_to_dict
from qcore.numbers.granularity import Shape
from qcore.ops import Choice, ConvJob, Kernel, ReferenceConv, choose
from qcore.ops.activation import PREFIX
from qcore.packing import Packing


class QuantizedConv(StoredWeight, RuntimeModule):
    """A convolution that runs from packed parts; the weight is a matrix [N, K/groups · kernel], as `Layout.matrix` gives it.

    geometry: "weight" (the shape of the float weight), "stride", "padding", "dilation", "groups", "padding_mode", as of nn.Conv1d, 2d, 3d.
    Quantized inputs are rows of channels, one for each position: per token is one scale a position, per tensor one for all.

    The kernel is chosen by `bind`, and again when the module moves to another device or dtype; never per call.  Without `bind` it is the reference.
    """

    name: ClassVar[str] = "quantized-conv"
    _job: ConvJob

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
        if axes not in (1, 2, 3):
            raise SpecError(f"a convolution has 1 to 3 spatial axes, got a weight of shape {self.geometry['weight']}")
        for name, part in (activation_parts or {}).items():
            self._keep(PREFIX + name, part)
        self.activation = activation
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._kernels: tuple[Kernel, ...] = (ReferenceConv(),)
        self._prepared: dict[str, Tensor] | None = None
        self.bind(self._kernels, dtype=torch.float32)

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

    def bind(self, kernels: Iterable[Kernel], device: torch.device | None = None, dtype: torch.dtype | None = None, wish: str | None = None) -> Self:
        """As of `QuantizedLinear`: choose the best of `kernels`, in place."""
        self._kernels, self._wish = tuple(kernels), wish
        self._job = ConvJob(
            op="conv",
            packing=self.packing.name,
            weight=self.spec,
            shape=self.shape,
            activation=self.activation,
            device=device or next(iter(self.stored().values())).device,
            dtype=dtype or self._job.dtype,
            unpack=partial(self.packing.unpack, spec=self.spec, shape=self.shape),
            geometry=self.geometry,
        )
        self._choice = choose(self._kernels, self._job, self._wish)
        self.parts_changed()
        return self

    def parts_changed(self) -> None:
        """Give the kernel its own form of the parts, as they are now."""
        parts = self.stored()
        self._prepared = None
        if any(t.is_meta for t in parts.values()):
            return
        prepared = self._choice.kernel.prepare(parts, self._job)
        if not (prepared.keys() == parts.keys() and all(prepared[k] is parts[k] for k in parts)):
            self._prepared = prepared

    def explain(self) -> Choice:
        """The kernel that runs, and why each better-ranked one does not."""
        return self._choice

    def forward(self, x: Tensor) -> Tensor:
        y = self._choice.kernel(x, self.stored() if self._prepared is None else self._prepared, self._job)
        return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, *[1] * self._job.axes)

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
        geometry = f"weight={g['weight']}, stride={g['stride']}, padding={g['padding']}, groups={g['groups']}"
        return f"{geometry}, {self.storage_repr()}, kernel={self._choice.kernel.name}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # what became of an empty tensor shows where the module goes, and in which dtype
        probe = fn(torch.empty(0, dtype=self._job.dtype, device=next(iter(self.stored().values())).device))
        super()._apply(fn, recurse)
        self.bind(self._kernels, None if probe.is_meta else probe.device, probe.dtype, self._wish)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.parts_changed()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.parts_changed()
