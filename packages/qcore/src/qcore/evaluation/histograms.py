"""How large the values of weights and of inputs are, before and after quantization: one histogram for each kind of module.

Magnitudes are counted in half octaves, so no range must be known beforehand, an outlier a thousand times the rest shows as what it is, and a grid
shows as the few magnitudes that are left.  Each module is looked at once, in the first batch that reaches it; of a large tensor every n-th value.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qcore.evaluation.kinds import kind_of
from qcore.model.reader import TensorReader
from qcore.modules.conv import QuantizedConv
from qcore.modules.stored import StoredWeight
from qcore.numbers import QuantSpec
from qcore.ops.activation import PREFIX, quantize_input, static_parts

LOWEST, HIGHEST, STEPS = -32, 24, 2  # powers of two that are told apart; bins of one octave
_BINS = (HIGHEST - LOWEST) * STEPS
_MOST_VALUES = 1 << 18  # of one tensor
_MOST_LAYERS = 8  # of one kind


@dataclass
class Magnitudes:
    """Counts of |x| by half octaves: bin i holds 2^(LOWEST + i/2) ≤ |x| < 2^(LOWEST + (i+1)/2), the ends what lies beyond; zeros apart."""

    counts: list[int] = field(default_factory=lambda: [0] * _BINS)
    zeros: int = 0
    largest: float = 0.0

    def add(self, values: Tensor) -> None:
        """Count the values of one tensor, every n-th of a large one; the largest of all is kept."""
        flat = values.detach().reshape(-1)
        if not flat.numel():
            return
        self.largest = max(self.largest, float(flat.abs().max()))
        # an odd step: no whole number of columns is skipped again and again
        size = flat[:: max(1, flat.numel() // _MOST_VALUES) | 1].double().abs()
        own = size[size > 0]
        self.zeros += int(size.numel() - own.numel())
        bins = ((own.log2() - LOWEST) * STEPS).floor().clamp(0, _BINS - 1).long()
        self.counts = [a + b for a, b in zip(self.counts, torch.bincount(bins, minlength=_BINS).tolist(), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the power of two at which the first bin that is not empty begins, its counts and the following ones'."""
        used = [i for i, n in enumerate(self.counts) if n] or [0]
        first, last = used[0], used[-1]
        return {
            "start": LOWEST + first / STEPS,
            "step": 1 / STEPS,
            "counts": self.counts[first : last + 1] if any(self.counts) else [],
            "zeros": self.zeros,
            "largest": self.largest if math.isfinite(self.largest) else None,
        }


@dataclass(frozen=True)
class Leaf:
    """A quantized weight whose module is a leaf: where it lies, and the name of its float parameter."""

    path: str
    param: str
    kind: str


def leaves_of(sites: Iterable[str]) -> list[Leaf]:
    """The leaves among report sites ("model.layers.3.mlp.down_proj:weight"): evenly chosen layers of each kind.  Parts of fused stacks are none."""
    by_kind: dict[str, list[Leaf]] = {}
    for site in sites:
        path, _, tensor = site.partition(":")
        if tensor.partition("[")[0] in ("weight", "router") and "[" not in tensor:
            own = kind_of(site)
            by_kind.setdefault(own, []).append(Leaf(path, f"{path}.weight", own))
    chosen = []
    for same in by_kind.values():
        n = min(len(same), _MOST_LAYERS)
        chosen += [same[round(i * (len(same) - 1) / max(n - 1, 1))] for i in range(n)]
    return chosen


@contextmanager
def watching_inputs(model: nn.Module, leaves: Sequence[Leaf], into: dict[str, Magnitudes]) -> Any:
    """Inside, the first input of every leaf is counted under its kind: what its weight is multiplied with, on its grid where it has one."""
    with ExitStack() as stack:
        for leaf in leaves:
            try:
                module = model.get_submodule(leaf.path)
            except AttributeError:  # a leaf that a split made: the float model has none
                continue
            stack.callback(_watch(module, into.setdefault(leaf.kind, Magnitudes())))
        yield


def _watch(module: nn.Module, counted: Magnitudes) -> Callable[[], None]:
    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        handle.remove()
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            counted.add(as_read(module, args[0]))

    handle = module.register_forward_pre_hook(see)
    return handle.remove


@torch.no_grad()
def as_read(module: nn.Module, x: Tensor) -> Tensor:
    """What a leaf's weight is multiplied with when the leaf is given x: behind an online transform, and on the input's grid."""
    online, spec = getattr(module, "online", None), getattr(module, "activation", None)
    if online is not None:
        x = online(x)
    if isinstance(spec, QuantSpec) and isinstance(module, StoredWeight):
        axes = len(module.geometry["weight"]) - 2 if isinstance(module, QuantizedConv) else 0
        x = quantize_input(x.movedim(-1 - axes, -1), spec, static_parts(module.stored()))
    return x


def float_weights(reader: TensorReader, leaves: Iterable[Leaf]) -> dict[str, Magnitudes]:
    """The float weights of the leaves, by kind; a leaf that a split made has none of its own."""
    found: dict[str, Magnitudes] = {}
    for leaf in leaves:
        if leaf.param in reader:
            found.setdefault(leaf.kind, Magnitudes()).add(reader[leaf.param])
    return found


def stored_weights(model: nn.Module, leaves: Iterable[Leaf], reader: TensorReader) -> dict[str, Magnitudes]:
    """The values that the stored weights of the leaves stand for, by kind.  reader: of the checkpoint; `model` may be on meta"""
    found: dict[str, Magnitudes] = {}
    for leaf in leaves:
        module = model.get_submodule(leaf.path)
        if isinstance(module, StoredWeight):
            parts = {part: reader[f"{leaf.path}.{part.replace('.', '__')}"] for part in module.stored() if not part.startswith(PREFIX)}
            found.setdefault(leaf.kind, Magnitudes()).add(module.packing.unpack(parts, module.spec, module.shape).dequantize())
    return found


def to_data(**histograms: Mapping[str, Magnitudes]) -> dict[str, Any]:
    """JSON-ready: {kind: {"weight_before": {…}, "weight_after": {…}, "input_before": {…}, "input_after": {…}}}; what was not seen is left out."""
    data: dict[str, Any] = {}
    for name, by_kind in histograms.items():
        for kind, counted in by_kind.items():
            if counted.zeros or any(counted.counts):
                data.setdefault(kind, {})[name] = counted.to_dict()
    return data
