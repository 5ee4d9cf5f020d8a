"""Several models on one task, the first of which is what the others are measured against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcore.evaluation.task import Forward, Progress, Scores, Task


@dataclass(frozen=True)
class Candidate:
    """A model that can be run.

    name:    what the table calls it
    forward: batch → logits
    bytes:   of its weights, as stored
    bits:    effective bits per weight of its quantized layers, from packed bytes; None for float models
    notes:   what every table about it must say
    """

    name: str
    forward: Forward
    bytes: int | None = None
    bits: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of a comparison."""

    name: str
    bytes: int | None
    bits: float | None
    scores: Scores
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "effective_bits": self.bits, "scores": self.scores, "notes": list(self.notes)}


def compare(models: Sequence[Callable[[], Candidate]], task: Task, folder: Path, progress: Progress | None = None) -> list[Row]:
    """Run each model, one after another, and measure it against the first.

    models: each makes its candidate when its turn comes, so that one at a time is in memory
    folder: where the first one's outputs are kept meanwhile
    """
    rows = []
    first = models[0]()
    reference = task.reference(first.forward, folder, progress)
    for i, make in enumerate(models):
        candidate = first if i == 0 else make()
        rows.append(Row(candidate.name, candidate.bytes, candidate.bits, task.evaluate(candidate.forward, reference, progress), candidate.notes))
        del candidate
        if i == 0:
            del first
    return rows
