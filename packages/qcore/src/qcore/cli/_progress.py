"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[[str, int, int], None]


@contextmanager
def progress(sample: Callable[[], None] = lambda: None) -> Iterator[Report]:
    """A function (phase, done, total) that shows how far each phase is.  sample: called at every step, to look at memory"""
    show = _Bars() if sys.stderr.isatty() else _Lines()

    def report(phase: str, done: int, total: int) -> None:
        sample()
        show(phase, done, total)

    try:
        yield report
    finally:
        show.close()


@contextmanager
def silent() -> Iterator[Report]:
    """The same of a process that shows nothing: another one does."""
    yield lambda phase, done, total: None


class _Lines:
    """One line at the start of a phase, one for every quarter of it."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if self._at.get(phase) != quarter:
            self._at[phase] = quarter
            print(f"{phase}: {done}/{total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Bars:
    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
        )
        self._tasks: dict[str, Any] = {}
        self._bars.start()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.update(self._tasks[phase], completed=done, total=total)

    def close(self) -> None:
        self._bars.stop()
