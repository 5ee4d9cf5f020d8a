"""What a plan says: decisions, estimates, and everything that stands against the run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from qcore.budget import Budget
from qcore.engines import Verdict
from qcore.errors import PlanError
from qcore.numbers.granularity import Shape

# matrix products of a small machine; the estimate says so
ASSUMED_FLOPS = 5e10
# of reading, searching scales, rounding and packing one weight, which no count of products shows: 130 to 170 ns on one core (docs/evidence/memory)
ASSUMED_SECONDS_PER_WEIGHT = 1e-7


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight.

    refused: (kernel, reason) of each better-ranked kernel that cannot run it
    """

    site: str
    shape: Shape
    spec: str
    solver: str
    packing: str
    kernel: str
    refused: tuple[tuple[str, str], ...]
    activation: str | None
    bytes_before: int
    bytes_after: int

    @property
    def values(self) -> int:
        return prod(self.shape)

    @property
    def kind(self) -> str:
        """Sites of one kind are one line of the table: the last name of the path, "q_proj:weight"; parts of a stack are of one kind."""
        last = self.site.rpartition(".")[2]
        name, bracket, part = last.partition("[")
        return f"{name}[*]" if bracket and part.removesuffix("]").isdigit() else last


@dataclass(frozen=True)
class TransformUse:
    """Which links a transform works on, as far as can be said before it is fitted."""

    transform: str
    observes: int
    links: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do, and everything that stands against it.

    left_float:    parameter → why it stays float
    refused:       axis of a weight → why no transform may touch it
    problems:      what must be mended first
    notes:         what is worth knowing
    flops:         of calibration and solving, an estimate
    budget:        memory, an estimate, and whether the model is streamed
    engines:       what programs that serve checkpoints make of it
    coverage:      of models with fused experts: how many there are, what data they will see, and what happens to those that see too little
    cache:         of recipes with a policy for keys and values: what is stored, and bytes of each token over all layers
    """

    model: str
    recipe: str
    decisions: tuple[Decision, ...]
    left_float: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict)
    transforms: tuple[TransformUse, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    needs_data: bool = False
    flops: float = 0.0
    budget: Budget | None = None
    coverage: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)
    engines: tuple[Verdict, ...] = ()

    @property
    def effective_bits(self) -> float | None:
        """Stored bits per quantized weight."""
        values = sum(d.values for d in self.decisions)
        return 8 * sum(d.bytes_after for d in self.decisions) / values if values else None

    @property
    def seconds(self) -> float:
        """An estimate, at `ASSUMED_FLOPS` and `ASSUMED_SECONDS_PER_WEIGHT`."""
        return self.flops / ASSUMED_FLOPS + ASSUMED_SECONDS_PER_WEIGHT * sum(d.values for d in self.decisions)

    def require(self) -> None:
        """PlanError when anything stands against the run."""
        if self.problems:
            raise PlanError(self.problems)

    def kinds(self) -> list[dict[str, Any]]:
        """One row for all decisions that are alike: same kind, shape, spec, solver, packing and kernel."""
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for d in self.decisions:
            key = (d.kind, d.shape, d.spec, d.activation, d.solver, d.packing, d.kernel)
            row = rows.setdefault(
                key,
                {
                    "kind": d.kind,
                    "count": 0,
                    "shape": list(d.shape),
                    "spec": d.spec,
                    "activation": d.activation,
                    "solver": d.solver,
                    "packing": d.packing,
                    "kernel": d.kernel,
                    "bytes_before": 0,
                    "bytes_after": 0,
                },
            )
            row["count"] += 1
            row["bytes_before"] += d.bytes_before
            row["bytes_after"] += d.bytes_after
        return list(rows.values())

    def left_float_kinds(self) -> dict[tuple[str, str], int]:
        """(last two names of the path, reason) → how many."""
        counts: dict[tuple[str, str], int] = {}
        for name, why in self.left_float.items():
            key = (".".join(name.split(".")[-2:]), why)
            counts[key] = counts.get(key, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "size": {"before_bytes": self.bytes_before, "after_bytes": self.bytes_after, "effective_bits": self.effective_bits},
            "estimate": {"flops": self.flops, "seconds": self.seconds, "at_flops_per_second": ASSUMED_FLOPS},
            "memory": None if self.budget is None else self.budget.to_dict(),
            "needs_calibration_data": self.needs_data,
            "coverage": dict(self.coverage),
            "cache": dict(self.cache),
            "transforms": [asdict(t) for t in self.transforms],
            "engines": [v.to_dict() for v in self.engines],
            "sites": [asdict(d) for d in self.decisions],
            "left_float": dict(self.left_float),
            "refused": dict(self.refused),
        }
