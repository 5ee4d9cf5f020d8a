"""Find plug-ins, load each on its own, and shelve what they bring.

pluggy holds the hooks and checks their signatures.  The loading is ours, because pluggy's stops at the first plug-in that does not
import, passes silently over a second distribution with the same entry-point name, and never calls a misspelt hook.  Here every plug-in
stands alone: what goes wrong with one is written into its `PluginRecord`, warned of once, and repeated when someone asks for a name
that is not there.

Each hook of a plug-in stands alone too: one that raises marks the plug-in failed and brings nothing, the others still count.  So what
a shelf holds never depends on which shelf was opened first.
"""

import difflib
import importlib
import importlib.util
import os
import sys
import traceback as tracebacks
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pluggy

from qcore.errors import PluginError
from qcore.plugins import hookspecs
from qcore.plugins.hookspecs import KINDS, PLUGIN_API
from qcore.plugins.shelf import BUILTIN, Shelf, plain

GROUP = "qcore"
BUILTIN_MODULE = "qcore.builtin"  # imported by name, for this room is below every room whose classes it hands in
VARIABLE = "QCORE_PLUGINS"
# they take so long to import that a command which needs none of them must not wait
HEAVY = ("torch", "transformers", "timm", "scipy", "pandas", "sklearn")


class PluginWarning(UserWarning):
    """A plug-in that was left out, or a part of it."""


@dataclass(frozen=True, kw_only=True)
class PluginRecord:
    """What became of one entry point.

    status: ok · disabled (QCORE_PLUGINS leaves it out) · failed · incompatible (written for a newer plug-in API) · duplicate (name taken)
    hooks:  the hooks it implements, known once it is imported
    heavy:  large libraries that the import of its module alone brought in; every command waits for them
    error:  one line; `traceback` holds the rest
    """

    name: str
    distribution: str
    version: str
    module: str
    status: Literal["ok", "disabled", "failed", "incompatible", "duplicate"] = "ok"
    api: str = PLUGIN_API
    hooks: tuple[str, ...] = ()
    heavy: tuple[str, ...] = ()
    error: str = ""
    traceback: str = ""

    @property
    def key(self) -> str:
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        return f"plug-in {self.name!r} ({self.distribution} {self.version})"


def _opened(kind: str) -> Any:
    """An attribute of Registry: the shelf of that kind, filled when first asked for."""
    return cached_property(lambda registry: registry._fill(kind))


class Registry:
    """Every class, recipe and command by kind and name: `load_registry().formats["int"]`.

    unknown: names in QCORE_PLUGINS that no installed plug-in has
    """

    formats: Shelf[type[Any]] = _opened("formats")
    observers: Shelf[type[Any]] = _opened("observers")
    transforms: Shelf[type[Any]] = _opened("transforms")
    solvers: Shelf[type[Any]] = _opened("solvers")
    block_solvers: Shelf[type[Any]] = _opened("block_solvers")
    allocators: Shelf[type[Any]] = _opened("allocators")
    selectors: Shelf[type[Any]] = _opened("selectors")
    modules: Shelf[type[Any]] = _opened("modules")
    packings: Shelf[type[Any]] = _opened("packings")
    kernels: Shelf[type[Any]] = _opened("kernels")
    adapters: Shelf[type[Any]] = _opened("adapters")
    sources: Shelf[type[Any]] = _opened("sources")
    calibrations: Shelf[type[Any]] = _opened("calibrations")
    tasks: Shelf[type[Any]] = _opened("tasks")
    exporters: Shelf[type[Any]] = _opened("exporters")
    lowerings: Shelf[type[Any]] = _opened("lowerings")
    recipes: Shelf[Path] = _opened("recipes")
    commands: Shelf[Callable[..., Any]] = _opened("commands")

    def __init__(self, wanted: str | None = None) -> None:
        """wanted: names of plug-ins or distributions with commas between; None means all, "" none."""
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._records: dict[str, PluginRecord] = {}
        allowed = None if wanted is None else {_canonical(w) for w in wanted.split(",") if w.strip()}
        seen: set[str] = set()
        first: dict[str, PluginRecord] = {}
        for dist, entry in _entry_points():
            record = PluginRecord(name=entry.name, distribution=dist.name, version=dist.version or "?", module=entry.value)
            names = {_canonical(record.name), _canonical(record.distribution)}
            seen |= names
            if allowed is not None and not names & allowed:
                self._note(replace(record, status="disabled", error=f"left out by {VARIABLE}"))
            elif (other := first.setdefault(_canonical(record.name), record)) is not record:
                error = (
                    f"its name {record.name!r} is taken by {other.distribution} {other.version}; "
                    f"uninstall one, or choose with {VARIABLE}={other.distribution} or {VARIABLE}={record.distribution}"
                )
                self._note(replace(record, status="duplicate", error=error))
            else:
                self._note(self._load(record, entry))
        self.unknown = tuple(sorted((allowed or set()) - seen))
        if self.unknown:
            there = ", ".join(r.name for r in self.plugins) or "none"
            _warn(f"{VARIABLE} names {', '.join(self.unknown)}, but no such plug-in is installed; there is: {there}")

    @property
    def plugins(self) -> tuple[PluginRecord, ...]:
        """One record per entry point, as things stand: a hook that raises when its shelf is opened changes its plug-in's record."""
        return tuple(self._records.values())

    def _load(self, record: PluginRecord, entry: EntryPoint) -> PluginRecord:
        """Import and register one plug-in; what is wrong with it comes back in the record."""
        before = set(sys.modules)
        try:
            module = _imported(entry)
            record = replace(record, heavy=tuple(name for name in HEAVY if name in sys.modules and name not in before))
            api = getattr(module, "QCORE_PLUGIN_API", PLUGIN_API)
            record = replace(record, api=str(api))
            if _major(api) > _major(PLUGIN_API):
                error = f"it needs plug-in API {api}, this qcore has {PLUGIN_API}; upgrade qcore, or install an older {record.distribution}"
                return replace(record, status="incompatible", error=error)
            self._manager.register(module, name=record.key)
            callers = self._manager.get_hookcallers(module) or []
            record = replace(record, hooks=tuple(sorted(c.name for c in callers if c.has_spec())))
            _check_hook_names(module, [c for c in callers if not c.has_spec()], record.key)
        except (Exception, SystemExit) as e:
            if self._manager.has_plugin(record.key):
                self._manager.unregister(name=record.key)
            return _failed(record, e)
        return record

    def _fill(self, kind: str) -> Shelf[Any]:
        """Open the shelf of one kind: built-ins first, which keep their names, then plug-ins by name."""
        if not self._manager.has_plugin(BUILTIN):
            self._manager.register(importlib.import_module(BUILTIN_MODULE), name=BUILTIN)
        shelf: Shelf[Any] = Shelf(kind, self._absent)
        hook = f"qcore_{kind}"
        impls = getattr(self._manager.hook, hook).get_hookimpls()
        for key in (BUILTIN, *self._records):
            for impl in (i for i in impls if i.plugin_name == key):
                try:
                    pairs = _named(kind, impl.function())
                except (Exception, SystemExit) as e:
                    if key == BUILTIN:  # a defect of ours, which shows its traceback
                        raise
                    self._note(_failed(self._records[key], e, f"in {hook}, "))
                    continue
                for name, item in pairs:
                    # plug-ins are registered as "distribution:entry-point", so none can take the built-ins' key
                    shelf.add(name, item, BUILTIN if key == BUILTIN else self._records[key].distribution)
        for name, origins in shelf.refused.items():
            _warn(f"{' and '.join(origins)} brings a {kind.removesuffix('s')} {name!r}, which qcore has already; qcore's own is used")
        return shelf

    def _note(self, record: PluginRecord) -> None:
        """Keep the record, and say so once if something is wrong with it."""
        self._records[record.key] = record
        if record.status not in ("ok", "disabled"):
            _warn(f"{record} did not load: {record.error}; `qcore plugins doctor` says more")

    def _absent(self) -> list[str]:
        """What a shelf says of plug-ins that might have brought the name it does not have."""
        disabled = ", ".join(r.name for r in self.plugins if r.status == "disabled")
        lines = [f"{VARIABLE} leaves out {disabled}"] if disabled else []
        bad = [r for r in self.plugins if r.status not in ("ok", "disabled")]
        return lines + [f"{r} did not load: {r.error}; `qcore plugins doctor` says more" for r in bad]


@cache
def load_registry() -> Registry:
    """Built-ins and every installed plug-in; `load_registry.cache_clear()` makes the next call look again."""
    return Registry(os.environ.get(VARIABLE))


def _entry_points() -> list[tuple[Distribution, EntryPoint]]:
    """Our group's entry points, ordered by distribution; one unreadable distribution hides no other.

    A distribution that lies on the path twice counts once, as the first one: that is the one Python imports.
    """
    found: dict[str, list[tuple[Distribution, EntryPoint]]] = {}
    for dist in distributions():
        try:
            entries = [(dist, e) for e in dist.entry_points if e.group == GROUP]
            if entries:
                found.setdefault(_canonical(dist.name), entries)
        except Exception as e:
            where = getattr(dist, "_path", "an installed distribution")
            _warn(f"the metadata of {where} cannot be read, and a plug-in in it would be missed: {_line(e)}; reinstall it")
    return [pair for _, entries in sorted(found.items()) for pair in sorted(entries, key=lambda pair: pair[1].name)]


def _check_hook_names(module: ModuleType, strangers: Iterable[pluggy.HookCaller], key: str) -> None:
    """Raise PluginError for a hook that qcore would never call: one it does not know, or one without its mark."""
    hooks = [f"qcore_{kind}" for kind in KINDS]
    for caller in strangers:
        if any(impl.plugin_name == key and not impl.optionalhook for impl in caller.get_hookimpls()):
            near = difflib.get_close_matches(caller.name, hooks, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the hooks are {', '.join(hooks)}"
            raise PluginError(f"it implements {caller.name}, which is no hook of qcore; {hint}")
    for hook in hooks:
        if callable(found := getattr(module, hook, None)) and not hasattr(found, f"{GROUP}_impl"):
            raise PluginError(f"its {hook} is never called, for it has no mark; put @hookimpl above it (from qcore.plugins import hookimpl)")


def _imported(entry: EntryPoint) -> Any:
    """What an entry point names; PluginError where it points nowhere, which is not the same as a library that is missing."""
    try:
        return entry.load()
    except ModuleNotFoundError as e:
        if e.name and f"{entry.module}.".startswith(f"{e.name}."):
            said = f'{entry.name} = "{entry.value}"'
            raise PluginError(f"its entry point {said} names a module that is not there; mend it in pyproject.toml, and install it anew") from e
        raise


def _named(kind: str, items: Any) -> list[tuple[str, Any]]:
    """(name, item) of all that one hook returned; PluginError for one that has no name."""
    if not isinstance(items, Iterable) or isinstance(items, str | Mapping | type):
        what = "paths" if kind == "recipes" else "functions" if kind == "commands" else "classes"
        raise PluginError(f"it returned {items!r}; return a list of {what}")
    if kind == "recipes":
        return [(path.stem, path) for item in items for path in _recipe_files(Path(item))]
    pairs = []
    for item in items:
        if kind != "commands":
            if not isinstance(item, type):
                raise PluginError(f"{item!r} is no class; return the class itself, its fields are filled in from the recipe")
            name, remedy = getattr(item, "name", None), "give it a `name: ClassVar[str]`, lower case"
        elif hasattr(item, "info"):  # a typer.Typer
            name, remedy = item.info.name, 'write typer.Typer(name="…")'
        else:
            name, remedy = getattr(item, "__name__", "").replace("_", "-"), "return a named function"
        if not isinstance(name, str) or not name.strip():
            raise PluginError(f"{item!r} has no name, and {kind} are asked for by name; {remedy}")
        pairs.append((name, item))
    return pairs


def _recipe_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.toml")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise PluginError(f"there is no recipe at {path}; return paths of TOML files or of folders of them, and ship them in the wheel")
    return files


def _failed(record: PluginRecord, e: BaseException, where: str = "") -> PluginRecord:
    """The record with one more error; an earlier one stays before it."""
    error = "; ".join(filter(None, [record.error, where + _line(e) + _place(e, record.module)]))
    return replace(record, status="failed", error=error, traceback=record.traceback + "".join(tracebacks.format_exception(e)))


def _line(e: BaseException) -> str:
    """Type and message on one line; of our own errors the message alone."""
    message = " ".join(str(e).split())
    return message if isinstance(e, PluginError) else f"{type(e).__name__}: {message}"


def _place(e: BaseException, module: str) -> str:
    """Where in the plug-in's own files it went wrong: " (ternary.py, line 3)"; "" for our own errors, and where no frame is its own."""
    if isinstance(e, PluginError | SyntaxError):
        return ""
    try:
        own = importlib.util.find_spec(module.partition(":")[0].partition(".")[0])
    except (ImportError, ValueError):  # it took itself out of sys.modules, or left no spec there
        return ""
    root = Path(own.origin) if own and own.origin else None
    folder = root.parent if root and root.name == "__init__.py" else root
    frames = [f for f in tracebacks.extract_tb(e.__traceback__) if folder and Path(f.filename).is_relative_to(folder)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _major(api: object) -> int:
    head = str(api).split(".")[0]
    if not head.isdigit():
        raise PluginError(f'its QCORE_PLUGIN_API is {api!r}, which is no version; write for instance QCORE_PLUGIN_API = "{PLUGIN_API}"')
    return int(head)


def _canonical(name: str) -> str:
    """Distribution names compare without case and with `-` for `_` and `.`."""
    return plain(name).replace("_", "-").replace(".", "-")


def _warn(message: str) -> None:
    warnings.warn(message, PluginWarning, stacklevel=2)
