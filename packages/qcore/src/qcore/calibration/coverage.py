"""The coverage ledger: how many rows each part of a fused stack was calibrated on, and what is done about parts that saw too few.

A router sends tokens where it likes.  An expert that saw none has a Gram matrix of zeros, and the rule of GPTQ's script for inputs that were never
seen would set all its weights to zero; one that saw ten has a matrix of rank ten.  So rows are counted, the counts are kept with the checkpoint, and
too few of them is an error unless the recipe says what to do:

    below = "fail"      name every such part, before anything is solved
    below = "layer"     fill up with the average Gram of the layer's other parts, if they read the same channels; where each part has channels of its
                        own (inside an expert), parts without any row are rounded to nearest
    below = "nearest"   round to nearest
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from qcore.calibration.observer import Seen
from qcore.calibration.observers import State, StreamingObserver
from qcore.errors import CalibrationError
from qcore.model.topology import Site, Topology

Below = Literal["fail", "layer", "nearest"]
BELOW: tuple[Below, ...] = ("fail", "layer", "nearest")


class RowCount(NamedTuple):
    """rows: how many were seen;  weight: what they weigh together"""

    rows: int
    weight: float


@dataclass(kw_only=True)
class Rows(StreamingObserver):
    """How many rows passed, and their weight.  The one observer for which none is an answer; beside it, others may have seen none as well."""

    name: ClassVar[str] = "rows"
    parts: ClassVar[tuple[str, ...]] = ("rows", "weight")

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        count = torch.tensor(rows.shape[-2], dtype=torch.int64)
        return {"rows": count, "weight": count.double() if weight is None else weight.sum()}

    def _join(self, a: State, b: State) -> State:
        return {name: a[name] + b[name] for name in self.parts}

    def result(self) -> RowCount:
        return RowCount(int(self._state["rows"]), float(self._state["weight"])) if self._state else RowCount(0, 0.0)


@dataclass
class Ledger:
    """What every part of every fused stack saw.

    minimum: rows below which a part counts as not covered;  below: what is done then
    counts:  parameter site → count
    instead: parameter site → what was done, in words
    """

    minimum: int = 1
    below: Below = "fail"
    counts: dict[Site, RowCount] = field(default_factory=dict)
    instead: dict[Site, str] = field(default_factory=dict)

    def short(self) -> list[Site]:
        """The parts that saw too few rows."""
        return [site for site, count in self.counts.items() if count.rows < self.minimum]

    def require(self) -> None:
        """CalibrationError with the list, where the policy is to fail."""
        if self.below == "fail" and (short := self.short()):
            raise CalibrationError(self._complaint(short))

    def _complaint(self, short: Sequence[Site]) -> str:
        listed: dict[tuple[str, str], list[str]] = {}
        for site in short:
            rows = self.counts[site].rows
            listed.setdefault((site.module, site.tensor), []).append(f"{site.part}" + (f" ({rows} rows)" if rows else ""))
        lines = [f"  {module}: {', '.join(parts)}" for (module, _), parts in listed.items()]
        few = f"fewer than {self.minimum} rows" if self.minimum > 1 else "no row"
        return (
            f"{len(short)} experts saw {few} of the calibration data; the router did not choose them:\n"
            + "\n".join(lines)
            + '\ncalibrate on more or broader text, or balanced text (calibration.source = {name = "ebss"}); or say what to do about them: '
            "--set calibration.below=layer fills up with the layer's average, --set calibration.below=nearest rounds them to nearest"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: {"minimum", "below", "stacks": {module: {parameter: {"rows": […], "weight": […], "instead": {part: what}}}}}"""
        stacks: dict[str, dict[str, Any]] = {}
        for site, count in self.counts.items():
            own = stacks.setdefault(site.module, {}).setdefault(site.tensor, {"rows": [], "weight": [], "instead": {}})
            own["rows"].append(count.rows)
            own["weight"].append(round(count.weight, 3))
            if site in self.instead:
                own["instead"][str(site.part)] = self.instead[site]
        return {"minimum": self.minimum, "below": self.below, "stacks": stacks}

    def records(self, sites: Iterable[Site]) -> list[list[Any]]:
        """Plain data of some sites, for the journal."""
        return [[s.module, s.tensor, s.part, *self.counts[s], self.instead.get(s, "")] for s in sites if s in self.counts]

    def restore(self, records: Iterable[Sequence[Any]]) -> None:
        """Take in what `records` gave."""
        for module, tensor, part, rows, weight, instead in records:
            site = Site(module, tensor, part)
            self.counts[site] = RowCount(rows, weight)
            if instead:
                self.instead[site] = instead


def share_inputs(topology: Topology, site: Site) -> bool:
    """Whether all parts of a stack read the same channels: a link reads the stack as a whole."""
    return any(port.param == site.param and port.axis == "in" and port.part is None for link in topology.links for port in link.reads)


def filled_up(seen: Mapping[Site, Seen], counts: Mapping[Site, RowCount], site: Site, minimum: int) -> Tensor | None:
    """The Gram of a part that saw n < `minimum` rows: (n·own + (minimum - n)·average of the layer) / minimum; None where the whole layer saw none.

    The average weighs every part by its rows: it is the Gram of all that was routed to the layer.
    """
    family = [s for s in seen if (s.module, s.tensor) == (site.module, site.tensor) and "gram" in seen[s]]
    if not family:
        return None
    total = sum(counts[s].rows for s in family)
    average = torch.stack([seen[s]["gram"] * (counts[s].rows / total) for s in family]).sum(0)
    n = min(counts[site].rows, minimum)
    own = seen[site].get("gram")
    return average if own is None else (own * n + average * (minimum - n)) / minimum
