"""What an observer is: a streaming summary of the rows that pass one site."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from qcore.numbers import QuantSpec


class Observer(Protocol):
    """A streaming summary of the rows that pass one site; resumable, and mergeable over data-parallel ranks.

    A class is a dataclass whose fields are its options; state lives in attributes set by `update`.  A solver or transform names the observers it
    wants as prototypes (`observes = (Gram(),)`); `fresh` makes the one that watches.
    """

    name: ClassVar[str]

    def update(self, rows: Tensor, weight: Tensor | None = None) -> None:
        """See rows [T, K] ([P, T, K] for grouped layers); weight [T]: importance of each row, None = 1 each."""

    def result(self) -> Any:
        """The summary; CalibrationError when no row was seen."""

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on: tensors by name; {} before the first row."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> None:
        """Take in what other ranks saw, in the order given."""

    def for_spec(self, spec: QuantSpec) -> Self:
        """The same observer, told for which spec its range is wanted; most do not care."""
        return self

    def fresh(self) -> Self:
        """A new observer with the same options that has seen nothing."""
        if not is_dataclass(self):
            return type(self)()
        return type(self)(**{f.name: getattr(self, f.name) for f in fields(self) if f.init})


Seen = Mapping[str, Any]  # results by observer name, of one site
