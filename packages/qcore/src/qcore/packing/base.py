"""What a packing is: how a quantized tensor lies in memory and on disk."""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from qcore.numbers import QTensor, QuantSpec
from qcore.numbers.granularity import Shape
from torch import Tensor


class Packing(Protocol):
    """dict → dict with local names; `unpack(pack(q), q.spec, q.shape)` gives every part of `q` back bit for bit.

    The tensor is a matrix [N, K] (`Layout.matrix`); names are local to the module ("weight_packed"), the checkpoint adds the path.
    """

    name: ClassVar[str]

    def refuses(self, spec: QuantSpec, shape: Shape) -> str | None:
        """Why it cannot hold such a tensor, or None when it can."""

    def pack(self, q: QTensor) -> dict[str, Tensor]: ...

    def unpack(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QTensor: ...
