"""The range of the best of several percentiles."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from qcore.calibration.observers import Percentile
from qcore.errors import SpecError
from qcore.numbers import Int, PerTensor, QuantSpec, fake_quantize, scale_parts
from torch import Tensor

State = dict[str, Tensor]


@dataclass(kw_only=True)
class BestPercentile(Percentile):
    """Of the ranges that leave a share 1 - q out at each end, for some q, the one whose rounding and clipping err least: min Σ (Q(x) - x)².

    spec: what the range is for, one scale for the tensor
    qs:   those of PTQ4RIS for the products inside BERT
    """

    name: ClassVar[str] = "best-percentile"
    spec: QuantSpec = field(default_factory=lambda: QuantSpec(format=Int(8), granularity=PerTensor()))
    qs: tuple[float, ...] = (0.999, 0.9999, 0.99999)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.qs or any(not 0.5 < q <= 1 for q in self.qs):
            raise SpecError(f"observer {self.name!r} has percentiles in (0.5, 1], got {self.qs}")
        if not isinstance(self.spec.granularity, PerTensor) or self.spec.format.parts:
            raise SpecError(f"observer {self.name!r} finds one range for a whole tensor on a fixed grid, got {self.spec}")

    def for_spec(self, spec: QuantSpec) -> Self:
        return replace(self, spec=spec)

    def _finish(self, state: State) -> tuple[Tensor, Tensor]:
        edges, counts = self._ascending(state)
        middles, used = ((edges[1:] + edges[:-1]) / 2).float(), counts > 0
        x, heavy = middles[used].clamp(state["low"], state["high"]), counts[used]
        found = []
        for q in self.qs:
            low, high = replace(self, q=q)._end(state)
            error = fake_quantize(x, self.spec, scale_parts(low, high, self.spec)) - x
            found.append((float((error.double().square() * heavy).sum()), low, high))
        _, low, high = min(found, key=lambda f: f[0])
        return low, high

    def _end(self, state: State) -> tuple[Tensor, Tensor]:
        return Percentile._finish(self, state)
