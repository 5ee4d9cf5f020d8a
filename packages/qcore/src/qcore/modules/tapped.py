"""Quantization at a tap: q, k, v and p inside an attention, h inside a mixer."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from qcore.model.tap import Tap
from qcore.modules.runtime import RuntimeModule
from qcore.modules.stored import from_table, resolved, table_of
from qcore.numbers import QuantSpec, spec_from_dict, spec_to_dict
from qcore.ops.activation import quantize_input


class QuantizedTap(Tap, RuntimeModule):
    """Puts the tapped tensor [..., K] on the spec's grid, seen as rows [T, K].

    parts: scale and offset of a static spec, [1, 1] or [1, K]; none for a dynamic one
    """

    name: ClassVar[str] = "quantized-tap"

    def __init__(self, spec: QuantSpec, parts: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self._names = tuple(parts or ())
        for name, part in (parts or {}).items():
            self.register_buffer(name, part)

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self._names}

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return quantize_input(x, self.spec, self.parts)

    def config(self) -> dict[str, Any]:
        return {"spec": spec_to_dict(self.spec), "parts": table_of(self.parts)}

    @classmethod
    def from_config(cls, config: dict[str, Any], registry: Any = None) -> Self:
        return cls(spec_from_dict(config["spec"], resolved(registry).formats), from_table(config["parts"]))

    def extra_repr(self) -> str:
        return str(self.spec)
