"""`QuantizedEmbedding`: a table of which only the rows looked up are ever dequantized."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.modules.runtime import RuntimeModule
from qcore.modules.stored import DTYPES, StoredWeight, dtype_name, resolved
from qcore.numbers import QuantSpec
from qcore.numbers.granularity import Shape
from qcore.packing import Packing


class QuantizedEmbedding(StoredWeight, RuntimeModule):
    """Rows of a stored table [V, H].

    dtype: of what comes out; follows the model when that is converted
    """

    name: ClassVar[str] = "quantized-embedding"

    def __init__(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape, packing: Packing, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(parts, spec, shape, packing)
        if not dtype.is_floating_point:
            raise SpecError(f"an embedding gives floats, got dtype {dtype}")
        self.dtype = dtype

    @property
    def num_embeddings(self) -> int:
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.shape[1]

    def forward(self, index: Tensor) -> Tensor:
        if index.numel() == 0:
            return torch.zeros(*index.shape, self.shape[1], dtype=self.dtype, device=index.device)
        flat = index.reshape(-1)
        if flat.min() < 0 or flat.max() >= self.shape[0]:
            raise IndexError(f"embedding index {int(flat.min())} … {int(flat.max())} outside of 0 … {self.shape[0] - 1}")
        return self._rows(flat).to(self.dtype).reshape(*index.shape, self.shape[1])

    def _rows(self, index: Tensor) -> Tensor:
        parts = self.packing.rows(self.stored(), index, self.spec, self.shape)
        if parts is None:
            return self.dequantize()[index]
        return self.packing.unpack(parts, self.spec, (index.numel(), self.shape[1])).dequantize()

    def config(self) -> dict[str, Any]:
        return self.stored_config() | {"dtype": dtype_name(self.dtype)}

    @classmethod
    def from_config(cls, config: dict[str, Any], registry: Any = None) -> Self:
        return cls(**cls.stored_arguments(config, resolved(registry)), dtype=DTYPES[config["dtype"]])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self.storage_repr()}"
