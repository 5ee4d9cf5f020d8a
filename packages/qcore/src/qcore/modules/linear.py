"""`QuantizedLinear`: y = kernel(quantize(online(x)), parts) + bias."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qcore.errors import SpecError
from qcore.modules.runtime import RuntimeModule
from qcore.modules.stored import StoredWeight, dtype_name, from_table, meta_bias, resolved
from qcore.numbers import QuantSpec, spec_from_dict, spec_to_dict
from qcore.numbers.granularity import Shape
from qcore.ops import Choice, Job, Kernel, ReferenceLinear, choose
from qcore.ops.activation import PREFIX
from qcore.packing import Packing


class QuantizedLinear(StoredWeight, RuntimeModule):
    """A linear layer that runs from packed parts; inputs float, or quantized by `activation`, after `online`.

    parts:            as the packing made them
    shape:            (N, K)
    bias:             [N] float, or None
    activation:       spec of the input; None = float
    activation_parts: scale and offset of a static activation, of a matrix of rows: [1, 1] or [1, K]
    online:           a module that the input goes through first (a Hadamard rotation); what is coded is its output
    transposed:       the float layer keeps its weight [K, N] (transformers' Conv1D); for those who build the float model first and load into it

    The kernel is chosen by `bind`, and again when the module moves to another device or dtype; never per call.  Without `bind` it is the reference.
    """

    name: ClassVar[str] = "quantized-linear"
    _job: Job

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        spec: QuantSpec,
        shape: Shape,
        packing: Packing,
        *,
        bias: Tensor | None = None,
        activation: QuantSpec | None = None,
        activation_parts: Mapping[str, Tensor] | None = None,
        online: nn.Module | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(parts, spec, shape, packing)
        if len(self.shape) != 2:
            raise SpecError(f"a linear weight is a matrix [N, K], got shape {self.shape}")
        if bias is not None and tuple(bias.shape) != self.shape[:1]:
            raise SpecError(f"bias has shape {tuple(bias.shape)}, but the weight has N={self.shape[0]} output channels")
        for name, part in (activation_parts or {}).items():
            self._keep(PREFIX + name, part)
        self.activation = activation
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.online = online
        self.transposed = transposed
        self._kernels: tuple[Kernel, ...] = (ReferenceLinear(),)
        self._prepared: dict[str, Tensor] | None = None
        self.bind(self._kernels, dtype=torch.float32)

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def bind(self, kernels: Iterable[Kernel], device: torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Choose the best of `kernels` for this weight, in place; the stored parts stay as they are.

        device: where it will run; None = where the parts lie
        dtype:  of the inputs; None = as before: float32, or what the model was last converted to
        """
        self._kernels = tuple(kernels)
        lies = next(iter(self.stored().values())).device
        self._job = Job(
            op="linear",
            packing=self.packing.name,
            weight=self.spec,
            shape=self.shape,
            activation=self.activation,
            device=device or lies,
            dtype=dtype or self._job.dtype,
            unpack=partial(self.packing.unpack, spec=self.spec, shape=self.shape),
        )
        self._choice = choose(self._kernels, self._job)
        self.parts_changed()
        return self

    def parts_changed(self) -> None:
        """Give the kernel its own form of the parts, as they are now; a kernel that runs from the stored ones costs no memory."""
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
        if self.online is not None:
            x = self.online(x)
        y = self._choice.kernel(x, self.stored() if self._prepared is None else self._prepared, self._job)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def config(self) -> dict[str, Any]:
        return self.stored_config() | {
            "bias": None if self.bias is None else dtype_name(self.bias.dtype),
            "transposed": self.transposed,
            "activation": None if self.activation is None else spec_to_dict(self.activation),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], registry: Any = None) -> Self:
        registry = resolved(registry)
        arguments = cls.stored_arguments(config, registry)
        inputs = {k.removeprefix(PREFIX): t for k, t in from_table(config["parts"]).items() if k.startswith(PREFIX)}
        activation = config["activation"]
        return cls(
            **arguments,
            bias=meta_bias(config["bias"], config["shape"][0]),
            transposed=bool(config.get("transposed", False)),
            activation=None if activation is None else spec_from_dict(activation, registry.formats),
            activation_parts=inputs,
        )

    def extra_repr(self) -> str:
        inputs = "" if self.activation is None else f", inputs {self.activation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.storage_repr()}{inputs}, kernel={self._choice.kernel.name}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # what became of an empty tensor shows where the module goes, and in which dtype
        probe = fn(torch.empty(0, dtype=self._job.dtype, device=next(iter(self.stored().values())).device))
        super()._apply(fn, recurse)
        self.bind(self._kernels, None if probe.is_meta else probe.device, probe.dtype)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.parts_changed()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.parts_changed()


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """Inside, every QuantizedLinear of `model` multiplies float inputs with its dequantized weight: what is stored, apart from how it is run."""
    kept = [(m, m.activation, m._kernels, m._job, m._choice, m._prepared) for m in model.modules() if isinstance(m, QuantizedLinear)]
    try:
        for m, *_ in kept:
            m.activation = None
            m.bind([ReferenceLinear()])
        yield
    finally:
        for m, activation, kernels, job, choice, prepared in kept:
            m.activation, m._kernels, m._job, m._choice, m._prepared = activation, kernels, job, choice, prepared
