"""A set-associative cache of line numbers, replaced least recently used first."""

from collections import OrderedDict, defaultdict

from qplug_hardware.nvr.config import CacheShape


class Cache:
    """Lines that are there.  Set = line modulo the number of sets; in a set the first key is the next to go."""

    def __init__(self, shape: CacheShape, line: int) -> None:
        self.ways = shape.ways
        self.sets = shape.sets(line)
        self._lines: defaultdict[int, OrderedDict[int, None]] = defaultdict(OrderedDict)

    def __contains__(self, line: int) -> bool:
        """Whether the line is there; its age stays what it was."""
        return line in self._lines[line % self.sets]

    def use(self, line: int) -> bool:
        """Whether the line is there; if so it is the youngest of its set now."""
        own = self._lines[line % self.sets]
        if line not in own:
            return False
        own.move_to_end(line)
        return True

    def insert(self, line: int) -> int | None:
        """Make `line` the youngest of its set; the line that had to go for it, or None."""
        own = self._lines[line % self.sets]
        if line in own:
            own.move_to_end(line)
            return None
        own[line] = None
        return own.popitem(last=False)[0] if len(own) > self.ways else None
