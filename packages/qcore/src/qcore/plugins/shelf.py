"""One kind of thing by name, and what to say when the name is not there."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from qcore.errors import NotFound, PluginError

T = TypeVar("T")
BUILTIN = "qcore"  # the origin of built-ins


class Shelf(Mapping[str, T]):
    """What there is of one kind, by name; names are compared in lower case.

    origin:    name → distribution that brought it, "qcore" for built-ins
    conflicts: name → the plug-ins that bring different things under it.  Such a name is on no shelf: asking for it raises PluginError.
    refused:   name of a built-in → the plug-ins that bring something else under it, which is left out: no plug-in takes away what is there without it
    """

    def __init__(self, kind: str, absent: Callable[[], list[str]]) -> None:
        self.kind = kind
        self.origin: dict[str, str] = {}
        self.conflicts: dict[str, tuple[str, ...]] = {}
        self.refused: dict[str, tuple[str, ...]] = {}
        self._items: dict[str, T] = {}
        self._absent = absent  # the plug-ins that did not load, in words: the name asked for may be one of theirs

    def add(self, name: str, item: T, origin: str) -> None:
        name = plain(name)
        if name in self.conflicts:
            self.conflicts[name] += (origin,)
        elif name not in self._items:
            self._items[name], self.origin[name] = item, origin
        elif self._items[name] == item:
            return
        elif self.origin[name] == BUILTIN:
            self.refused[name] = (*self.refused.get(name, ()), origin)
        else:
            del self._items[name]
            self.conflicts[name] = (self.origin.pop(name), origin)

    def __getitem__(self, name: str) -> T:
        name = plain(name)
        if name in self._items:
            return self._items[name]
        what = self.kind.removesuffix("s")
        if name in self.conflicts:
            both = " and by ".join(self.conflicts[name])
            raise PluginError(
                f"{what} {name!r} is given by {both}, and they differ; rename one, uninstall one, "
                f"or leave one out with QCORE_PLUGINS=<the plug-ins you want, with commas between>"
            )
        # "rtn" is far from "w4a16-rtn" by letters, and yet what was meant
        near = difflib.get_close_matches(name, self._items, n=3) or sorted(n for n in self._items if name and name in re.split(r"\W+", n))[:3]
        have = ", ".join(f"{n} ({self.origin[n]})" for n in sorted(self._items)) or "none"
        lines = [f"no {what} named {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")]
        lines += [f"there is: {have}", *self._absent()]
        lines += ["if a plug-in brings it, install that plug-in (`uv pip install …`); `qcore plugins list` shows those that are there"]
        raise NotFound("\n  ".join(lines))

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`; a name in conflict still raises PluginError."""
        try:
            return self[name]
        except NotFound:
            return default

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and plain(name) in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"<{len(self)} {self.kind}: {', '.join(sorted(self)) or 'none'}>"


def plain(name: str) -> str:
    return name.strip().lower()
