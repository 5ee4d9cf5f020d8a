"""What every module with a stored weight has in common: the packed parts as buffers, their spec, and the way back."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from qcore.errors import SpecError
from qcore.numbers import QTensor, QuantSpec, spec_from_dict, spec_to_dict
from qcore.numbers.granularity import Shape
from qcore.packing import Packing

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)} | {
    str(d).removeprefix("torch."): d for d in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn)
}
PartTable = dict[str, list[Any]]  # part name → [dtype name, shape]
LARGEST = 1 << 40  # values of one tensor; what claims to be larger is not a checkpoint


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table_of(parts: Mapping[str, Tensor]) -> PartTable:
    """Dtype and shape of each part, JSON-ready."""
    return {name: [dtype_name(t.dtype), list(t.shape)] for name, t in parts.items()}


def from_table(table: PartTable) -> dict[str, Tensor]:
    """Parts of those dtypes and shapes, on meta."""
    found = {}
    for name, (dtype, shape) in table.items():
        if dtype not in DTYPES:
            raise SpecError(f"part {name!r} has dtype {dtype!r}, which no packing stores; have: {', '.join(DTYPES)}")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= LARGEST for n in shape):
            raise SpecError(f"part {name!r} has shape {shape!r}")
        found[name] = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    return found


def meta_bias(dtype: str | None, n: int) -> Tensor | None:
    """A bias [N] without values; None where the config has none."""
    if dtype is None:
        return None
    if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
        raise SpecError(f"a bias has a float dtype, got {dtype!r}")
    return torch.empty(n, dtype=DTYPES[dtype], device="meta")


def resolved(registry: Any) -> Any:
    """The registry, or the one of this installation."""
    if registry is None:
        from qcore.plugins import load_registry

        registry = load_registry()
    return registry


class StoredWeight(nn.Module):
    """A weight [N, K] as packed parts.

    The parts are buffers named as the packing names them ("." becomes "__", which buffers may hold), so the state dict of a compressed-tensors
    packing is a compressed-tensors checkpoint.  They keep their dtypes when the model is converted: `model.half()` must not move a weight off
    its grid.
    """

    def __init__(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape, packing: Packing) -> None:
        super().__init__()
        self.spec, self.shape, self.packing = spec, tuple(shape), packing
        self._buffer_of: dict[str, str] = {}
        for name, part in parts.items():
            self._keep(name, part)

    def _keep(self, part: str, value: Tensor) -> None:
        buffer = part.replace(".", "__")
        self._buffer_of[part] = buffer
        self.register_buffer(buffer, value)

    def stored(self) -> dict[str, Tensor]:
        """The stored parts by the packing's names; static inputs' as "input.…"."""
        return {part: cast(Tensor, self._buffers[buffer]) for part, buffer in self._buffer_of.items()}

    def qtensor(self) -> QTensor:
        """The weight as numbers: codes, scales, offsets, unpacked.  [N, K]"""
        return self.packing.unpack(self.stored(), self.spec, self.shape)

    def dequantize(self) -> Tensor:
        """The values that the stored weight stands for.  [N, K] float32"""
        return self.qtensor().dequantize()

    def stored_config(self) -> dict[str, Any]:
        return {"spec": spec_to_dict(self.spec), "shape": list(self.shape), "packing": self.packing.name, "parts": table_of(self.stored())}

    @staticmethod
    def stored_arguments(config: Mapping[str, Any], registry: Any) -> dict[str, Any]:
        """Constructor arguments out of `stored_config`, with the weight's parts on meta; those of static inputs are left in `config`."""
        shape = config["shape"]
        if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n <= LARGEST for n in shape):
            raise SpecError(f"a weight has shape {shape!r}")
        spec = spec_from_dict(config["spec"], registry.formats)
        packing: Packing = registry.packings[config["packing"]]()
        if reason := packing.refuses(spec, tuple(shape)):
            raise SpecError(f"packing {packing.name!r} {reason}")
        parts = {k: t for k, t in from_table(config["parts"]).items() if not k.startswith("input.")}
        try:
            q = packing.unpack(parts, spec, tuple(shape))
        except KeyError as e:
            raise SpecError(f"packing {packing.name!r} needs the part {e}, which is not there") from e
        if (wrong := q.misfit()) is not None:
            raise SpecError(wrong)
        return {
            "parts": parts,
            "spec": spec,
            "shape": tuple(shape),
            "packing": packing,
        }

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in self._buffer_of.values()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def storage_repr(self) -> str:
        return f"{self.spec}, packing={self.packing.name}"


@torch.no_grad()
def serve_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert `model` in place to the dtype in which it will be stored and run: parameters, statistics, what run-time modules take and give.

    Stored parts and computed (not persistent) buffers keep theirs.  `model.to(dtype)` would convert the latter: rotary frequencies in bfloat16 turn
    far positions by the wrong angle.
    """

    def convert(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    for m in model.modules():
        if isinstance(m, StoredWeight):
            m._apply(convert, recurse=False)
            continue
        for p in m._parameters.values():
            if p is not None:
                p.data = convert(p.data)
        # statistics of norms; the buffers of other run-time modules are theirs to convert
        if not hasattr(type(m), "from_config"):
            m._buffers.update({n: convert(b) for n, b in m._buffers.items() if b is not None and n not in m._non_persistent_buffers_set})
