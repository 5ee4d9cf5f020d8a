"""How much memory this process took."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_MOST_SAMPLES = 256


@dataclass
class MemoryMeter:
    """Peak resident memory, by the kernel's own counter, and the largest anonymous memory at the moments when `sample` was called.

    The resident peak (VmHWM) counts pages of mapped files, which the kernel may drop at any time, and the libraries themselves; anonymous
    memory (RssAnon) is what had to be there.  None where the system has no such figures.

    before: resident memory when the meter was made: Python and its libraries
    phase:  what is going on; `by_phase` keeps the largest anonymous memory of each
    timeline: (seconds since the meter was made, anonymous memory), at most `_MOST_SAMPLES` of them: then every second one is forgotten
    spans:  (phase, start, stop) in seconds
    """

    before: int | None = None
    anonymous: int | None = None
    phase: str = "load"
    by_phase: dict[str, int] = field(default_factory=dict)
    timeline: list[tuple[float, int]] = field(default_factory=list)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    _file: Path = field(default=_STATUS, repr=False)
    _start: float = field(default_factory=time.perf_counter, repr=False)
    _every: float = field(default=0.0, repr=False)  # seconds between two points of the timeline

    def __post_init__(self) -> None:
        self.before = self._read("VmRSS")
        self.sample()

    def sample(self) -> None:
        """Look at anonymous memory now."""
        now = self._read("RssAnon")
        if now is not None:
            self.anonymous = max(self.anonymous or 0, now)
            self.by_phase[self.phase] = max(self.by_phase.get(self.phase, 0), now)
            self._note(now)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, `phase` is going on."""
        self.phase, started = phase, self.seconds
        try:
            yield
        finally:
            self.spans.append((phase, round(started, 3), round(self.seconds, 3)))

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return time.perf_counter() - self._start

    def _note(self, now: int) -> None:
        at = self.seconds
        if self.timeline and at - self.timeline[-1][0] < self._every:
            return
        self.timeline.append((round(at, 3), now))
        if len(self.timeline) > _MOST_SAMPLES:
            self.timeline = self.timeline[::2]
            self._every = 2 * max(self._every, at / _MOST_SAMPLES)

    @property
    def peak(self) -> int | None:
        """Bytes, since the process began."""
        return self._read("VmHWM")

    def _read(self, key: str) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._file.read_text().splitlines():
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
        return None

    def to_dict(self) -> dict[str, Any]:
        """What a report says."""
        self.sample()
        return {
            "peak_bytes": self.peak,
            "anonymous_bytes": self.anonymous,
            "before_loading_bytes": self.before,
            "anonymous_by_phase": self.by_phase,
            "timeline": self.timeline,
            "spans": self.spans,
        }
