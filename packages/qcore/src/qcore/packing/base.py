"""What a packing is: how a quantized tensor lies in memory and on disk."""

from collections.abc import Iterable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import QTensor, QuantSpec
from qcore.numbers.granularity import Shape
from qcore.numbers.spec import SCALE_DTYPES


class Packing(Protocol):
    """dict → dict with local names; `unpack(pack(q), q.spec, q.shape)` gives every part of `q` back bit for bit.

    The tensor is a matrix [N, K] (`Layout.matrix`); names are local to the module ("weight_packed"), the checkpoint adds the path.

    rank:        where several accept a spec, the lowest is taken
    weight_only: its consumers expect float inputs; with quantized inputs another packing that accepts goes first
    """

    name: ClassVar[str]
    rank: ClassVar[int] = 500
    weight_only: ClassVar[bool] = False

    def refuses(self, spec: QuantSpec, shape: Shape) -> str | None:
        """Why it cannot hold such a tensor, or None when it can."""

    def pack(self, q: QTensor) -> dict[str, Tensor]: ...

    def unpack(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QTensor: ...

    def rows(self, parts: Mapping[str, Tensor], index: Tensor, spec: QuantSpec, shape: Shape) -> dict[str, Tensor] | None:
        """The stored parts of some rows alone, index [n]: what a lookup table unpacks.  None where rows cannot be cut out: all is unpacked then."""
        return None


def first_that_accepts(packings: Iterable[Packing], spec: QuantSpec, shape: Shape, activation: QuantSpec | None = None) -> Packing:
    """The best packing that can hold a tensor of this spec and shape; a SpecError lists why none can.

    activation: of the layer's input, if it is quantized
    """

    def order(p: Packing) -> tuple[bool, int, str]:
        return (activation is not None and getattr(p, "weight_only", False), getattr(p, "rank", 500), p.name)

    refused = []
    for packing in sorted(packings, key=order):
        reason = packing.refuses(spec, shape)
        if reason is None:
            return packing
        refused.append(f"  {packing.name}: {reason}")
    reasons = "\n".join(refused) or "  there is no packing at all"
    raise SpecError(f"no packing holds {spec} of shape {shape}\n{reasons}\nchange the spec, or install the plug-in that brings a packing for it")


def to_stored_scale(values: Tensor, spec: QuantSpec, what: str = "scale") -> Tensor:
    """float32 scales in the dtype that the spec stores; a SpecError when that would change one."""
    assert isinstance(spec.scale, str), spec.scale
    stored = values.to(SCALE_DTYPES[spec.scale])
    if not values.is_meta and not torch.equal(stored.float(), values.float()):
        worst = (stored.float() - values.float()).abs().max()
        raise SpecError(
            f"the {what} is to be stored as {spec.scale}, which cannot hold it: it would move by up to {float(worst):.3g}; "
            "a solver must round scales (`numbers.tensor.store_scale`) before it chooses codes"
        )
    return stored
