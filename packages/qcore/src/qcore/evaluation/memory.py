"""How much memory this process took."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


@dataclass
class MemoryMeter:
    """Peak resident memory, by the kernel's own counter, and the largest anonymous memory at the moments when `sample` was called.

    The resident peak (VmHWM) counts pages of mapped files, which the kernel may drop at any time, and the libraries themselves; anonymous
    memory (RssAnon) is what had to be there.  None where the system has no such figures.

    before: resident memory when the meter was made: Python and its libraries
    phase:  what is going on; `by_phase` keeps the largest anonymous memory of each
    """

    before: int | None = None
    anonymous: int | None = None
    phase: str = "load"
    by_phase: dict[str, int] = field(default_factory=dict)
    _file: Path = field(default=_STATUS, repr=False)

    def __post_init__(self) -> None:
        self.before = self._read("VmRSS")
        self.sample()

    def sample(self) -> None:
        """Look at anonymous memory now."""
        now = self._read("RssAnon")
        if now is not None:
            self.anonymous = max(self.anonymous or 0, now)
            self.by_phase[self.phase] = max(self.by_phase.get(self.phase, 0), now)

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
        return {"peak_bytes": self.peak, "anonymous_bytes": self.anonymous, "before_loading_bytes": self.before, "anonymous_by_phase": self.by_phase}
