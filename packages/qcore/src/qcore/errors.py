"""Every error that qcore raises on purpose.

A message names the place, both values and the next step.  The command line prints it without a traceback and ends with exit code 2;
anything that is not a `QcoreError` is a defect of ours, and shows its traceback.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class QcoreError(Exception):
    """Base of all errors that a user can cause and mend."""


class SpecError(QcoreError):
    """A number format, granularity or recipe that does not fit the tensor it is meant for."""


class NotFound(QcoreError, LookupError):
    """A name, file or pattern that stands for nothing; the message lists what there is."""


class CalibrationError(QcoreError):
    """Calibration data that is missing, too short, or never reached a place that needs it."""


class CheckpointError(QcoreError):
    """A checkpoint that is truncated, corrupt, too new, or needs something that is not installed."""


class PluginError(QcoreError):
    """A plug-in that did not load, clashes with another one, or breaks the contract it signed."""


class Stopped(QcoreError):
    """A run that ended from outside, through no fault of its input: what it has finished is kept, and it can be resumed."""


class PlanError(QcoreError):
    """Everything that stands against a run, found before the run."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        head = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{head} found before any computing:\n" + "\n".join(f"  - {p}" for p in self.problems))


@contextmanager
def at(place: object) -> Iterator[None]:
    """Put `place` before the message of any QcoreError raised inside: the inner says what, the outer says where."""
    try:
        yield
    except PlanError:
        raise
    except QcoreError as e:
        raise type(e)(f"{place}: {e}") from e
