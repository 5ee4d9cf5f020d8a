"""Which attribute of the Gaussians costs what: each one alone on fewer bits, everything else float."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from qcore.calibration.observers import MinMax
from qcore.errors import SpecError
from qcore.evaluation.store import Reference
from qcore.evaluation.task import Batch
from qcore.model.tap import Tap, attach, detach
from qcore.modules.tapped import QuantizedTap
from qcore.numbers import Int, Offset, PerChannel, PerTensor, QuantSpec, Unscaled, scale_parts
from torch import Tensor, nn

from qplug_perception.gsrender.data import OccupancyTask
from qplug_perception.gsrender.formats import TwoRegion
from qplug_perception.gsrender.gaussians import ATTRIBUTES
from qplug_perception.gsrender.model import OccupancyNet

BITS = (8, 6, 4, 3, 2)


@dataclass(frozen=True)
class Point:
    """What one attribute on so many bits did; bits = 0: all float.  scores: as `OccupancyTask` gives them"""

    attribute: str
    bits: int
    scores: dict[str, float]


def spec_of(attribute: str, bits: int, threshold: float) -> QuantSpec:
    """How `gsrender-w8a8` stores an attribute, on so many bits."""
    if attribute == "delta_mu":
        return QuantSpec(format=Int(bits), granularity=PerTensor())
    if attribute == "delta_s":
        return QuantSpec(format=Int(bits), granularity=PerTensor(), offset=Offset.CODE)
    if attribute == "opacity":
        return QuantSpec(format=TwoRegion(bits, threshold, keep_side=True), granularity=Unscaled())
    if attribute == "semantic":
        return QuantSpec(format=Int(bits), granularity=PerChannel(1))
    raise SpecError(f"a Gaussian has no attribute {attribute!r}; it has {', '.join(ATTRIBUTES)}")


@dataclass(frozen=True)
class _Look:
    observer: MinMax

    def tap(self) -> Tap:
        own = Tap()
        own.forward = self._see  # type: ignore[method-assign]
        return own

    def _see(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        self.observer.update(x.reshape(-1, x.shape[-1]))
        return x


@contextmanager
def _attached(module: nn.Module, handler: Tap) -> Iterator[None]:
    attach(module, "value", handler)
    try:
        yield
    finally:
        detach(module, "value", handler)


@torch.no_grad()
def sweep(model: OccupancyNet, batches: Sequence[Batch], task: OccupancyTask, folder: Path, bits: Sequence[int] = BITS) -> list[Point]:
    """Every attribute on each number of bits, one at a time.  Ranges are those of the calibration batches, δμ's is known.

    folder: where the float model's outputs are kept
    """
    if not batches:
        raise SpecError("a sweep wants calibration batches: ranges of the attributes are not taken from evaluated samples")
    reference: Reference = task.reference(model, folder)
    points = [Point("float", 0, task.evaluate(model, reference))]
    for attribute in ATTRIBUTES:
        module = model.head.get_submodule(attribute)
        look = _Look(MinMax(granularity="channel" if attribute == "semantic" else "tensor"))
        with _attached(module, look.tap()):
            for batch in batches:
                model(batch)
        low, high = (end.reshape(1, -1) for end in look.observer.result())
        if attribute == "delta_mu":
            low, high = torch.full_like(low, -1.0), torch.full_like(high, 1.0)
        for count in bits:
            spec = spec_of(attribute, count, model.config.threshold)
            with _attached(module, QuantizedTap(spec, scale_parts(low, high, spec) if spec.scaled else None)):
                points.append(Point(attribute, count, task.evaluate(model, reference)))
    return points


def table(points: Sequence[Point]) -> list[str]:
    """Lines of plain text, one a point."""
    names = ["rayiou", "depth_l1", "semantic_ce", "top1", "flips"]
    lines = [f"{'attribute':<10} {'bits':>4}  {'own dB':>7}  " + "  ".join(f"{n:>11}" for n in names if n in points[0].scores)]
    for p in points:
        own = p.scores.get(f"{p.attribute}_db", float("inf"))
        values = "  ".join(f"{p.scores[n]:>11.4f}" for n in names if n in p.scores)
        lines.append(f"{p.attribute:<10} {p.bits or '–':>4}  {own:>7.1f}  {values}")
    return lines
