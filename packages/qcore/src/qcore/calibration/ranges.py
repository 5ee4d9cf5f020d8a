"""Static scales of activations: which range is observed, and the scale and offset that it becomes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qcore.calibration.observer import Observer
from qcore.calibration.observers import MinMax
from qcore.errors import SpecError
from qcore.numbers import PerChannel, PerGroup, PerHead, PerTensor, QuantSpec, scale_parts


@dataclass(frozen=True)
class RangeOf(Observer):
    """A range observer under the name "range", so that it stands beside whatever a solver observes at the same site."""

    name: ClassVar[str] = "range"
    observer: Observer

    def update(self, rows: Tensor, weight: Tensor | None = None) -> None:
        self.observer.update(rows, weight)

    def result(self) -> Any:
        return self.observer.result()

    def state(self) -> dict[str, Tensor]:
        return self.observer.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.observer.load(state)

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> None:
        self.observer.merge(states)

    def fresh(self) -> "RangeOf":
        return RangeOf(self.observer.fresh())


def static_problem(spec: QuantSpec) -> str | None:
    """Why an activation cannot have static scales of this spec; None where it can.  Rows come and go, so scales are of the tensor or of columns."""
    g = spec.granularity
    if not spec.scaled or isinstance(g, PerTensor | PerGroup | PerHead) or (isinstance(g, PerChannel) and g.axis in (1, -1)):
        return None
    return f'static scales of activations are per tensor, per channel (axis 1), group or head, got {spec}; use one of them, or when = "dynamic"'


def range_observer(spec: QuantSpec, wanted: Observer | None) -> RangeOf:
    """What watches a site with static scales.  wanted: None = the extremes; others are told the spec for which they search (`Observer.for_spec`)"""
    if problem := static_problem(spec):
        raise SpecError(problem)
    if wanted is None:
        wanted = MinMax(granularity="tensor" if isinstance(spec.granularity, PerTensor) else "channel")
    return RangeOf(wanted.for_spec(spec))


def range_parts(found: Any, spec: QuantSpec, observer: str = "range") -> dict[str, Tensor]:
    """Scale and offset of rows [T, K], [1, 1], [1, K] or [1, K/G], from a range (low, high) of all values or of each channel."""
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(end, Tensor) for end in found)):
        raise SpecError(f"observer {observer!r} gives no range (low, high), got {type(found).__name__}; take minmax, ema, percentile, mse or kl")
    low, high = (end.reshape(1, -1) for end in found)
    if isinstance(spec.granularity, PerTensor) and low.shape[1] != 1:
        raise SpecError(f'{spec} has one scale, but observer {observer!r} found {low.shape[1]} ranges; set granularity = "tensor" in the observer')
    if isinstance(spec.granularity, PerChannel | PerGroup | PerHead) and low.shape[1] == 1:
        raise SpecError(f'{spec} has several scales, but observer {observer!r} found one range; take minmax with granularity = "channel"')
    if isinstance(spec.granularity, PerGroup | PerHead):
        size = spec.granularity.block((1, low.shape[1]))[1]
        low, high = low.unflatten(1, (-1, size)).amin(-1), high.unflatten(1, (-1, size)).amax(-1)
    return scale_parts(low, high, spec)
