"""Several models on one task, the first of which is what the others are measured against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcore.evaluation.attribution import Attribution, FloatAgain, attribute
from qcore.evaluation.store import Reference
from qcore.evaluation.task import Forward, LanguageModeling, Progress, Scores, Task


@dataclass(frozen=True)
class Candidate:
    """A model that can be run.

    name:    what the table calls it
    forward: batch → logits
    bytes:   of its weights, as stored
    bits:    effective bits per weight of its quantized layers, from packed bytes; None for float models
    notes:   what every table about it must say
    again:   makes what lets its modules be float again; None for models that cannot be attributed, which are float
    """

    name: str
    forward: Forward
    bytes: int | None = None
    bits: float | None = None
    notes: tuple[str, ...] = ()
    again: Callable[[], FloatAgain] | None = None


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    best: no other model of the comparison is both no larger and no farther from the first one (the Pareto front of size and KL divergence)
    """

    name: str
    bytes: int | None
    bits: float | None
    scores: Scores
    notes: tuple[str, ...] = ()
    attribution: Attribution | None = None
    best: bool = False

    def to_dict(self) -> dict[str, Any]:
        own = {
            "name": self.name,
            "bytes": self.bytes,
            "effective_bits": self.bits,
            "scores": self.scores,
            "best": self.best,
            "notes": list(self.notes),
        }
        return own if self.attribution is None else own | {"attribution": self.attribution.to_dict()}


def compare(
    models: Sequence[Callable[[], Candidate]], task: Task, folder: Path, progress: Progress | None = None, attribute_rows: int | None = None
) -> list[Row]:
    """Run each model, one after another, and measure it against the first.

    models: each makes its candidate when its turn comes, so that one at a time is in memory
    folder: where the first one's outputs are kept meanwhile
    attribute_rows: find out which modules the loss comes from, on about so many tokens of the task; None = do not
    """
    rows: list[Row] = []
    first = models[0]()
    reference = task.reference(first.forward, folder, progress)
    for i, make in enumerate(models):
        candidate = first if i == 0 else make()
        found = None
        scores = task.evaluate(candidate.forward, reference, progress)
        if attribute_rows is not None and candidate.again is not None:
            found = attribute(candidate.again(), *part_of(task, reference, attribute_rows), progress)
        rows.append(Row(candidate.name, candidate.bytes, candidate.bits, scores, candidate.notes, found))
        del candidate
        if i == 0:
            del first
    front = pareto([(row.bytes, row.scores.get("kl")) for row in rows])
    return [replace(row, best=best) for row, best in zip(rows, front, strict=True)]


def part_of(task: Task, reference: Reference, rows: int) -> tuple[Task, Reference]:
    """A smaller task of the same kind, where it can be cut; else the whole one."""
    return task.part(rows, reference) if isinstance(task, LanguageModeling) else (task, reference)


def pareto(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Which points (size, loss) no other one beats: smaller in one and no larger in the other.  Equal points stand together; None is on no front."""
    known = [(x, y) for x, y in points if x is not None and y is not None]

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b <= y and (a < x or b < y) for a, b in known)

    return [x is not None and y is not None and not beaten(x, y) for x, y in points]
