"""`qcore.json`: what each stored module is, and which distribution brings what it needs.

It is read before anything is built, and nothing in it is trusted: types are checked here, names against the registry and the skeleton, shapes
against the safetensors headers, and file names may not leave the folder.  It holds no clock and no machine, so the same run writes the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from qcore.errors import CheckpointError

MANIFEST = "qcore.json"
VERSION = 1  # raised when an older qcore would misread what a newer one writes
LayoutName = Literal["compressed-tensors", "qcore"]
KINDS = ("modules", "formats", "packings", "adapters", "sources")


def qcore_version() -> str:
    try:
        return version("qcore")
    except PackageNotFoundError:
        return "unknown"


def content_hash(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def natural(path: str) -> tuple[Any, ...]:
    """A sort key of paths that puts "9" before "10"."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split("."))


@dataclass(frozen=True)
class ModuleEntry:
    """One run-time module.

    type:   its registered name
    config: what `from_config` takes; for stored weights also the spec, the packing, and dtype and shape of each part
    """

    type: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is needed to rebuild a model, besides its float architecture and its tensors.

    layout:  "compressed-tensors": plain transformers loads it; "qcore": only qcore does
    modules: path → entry; modules inside a module have entries of their own
    shared:  path → the path whose module it is too
    ties:    tensor name → the name under which it is stored
    dtype:   of the model's float parameters and inputs
    source:  the ModelSource that can rebuild the float architecture; "" = the user passes it
    adapter: the ModelAdapter that prepares it; "" = none
    origins: kind → name → distribution, of everything the entries name
    files:   weights file → bytes
    sha256:  weights file → SHA-256 of its content; a file that is not named, by an older qcore, is not compared
    record:  how it was made: recipe, seed, data hash, coverage; nothing at run time reads it
    """

    layout: LayoutName
    modules: Mapping[str, ModuleEntry]
    shared: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    source: str = ""
    adapter: str = ""
    origins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    written_by: str = field(default_factory=qcore_version)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "manifest": VERSION,
            "qcore": self.written_by,
            "layout": self.layout,
            "source": self.source,
            "adapter": self.adapter,
            "dtype": self.dtype,
            "origins": {kind: dict(names) for kind, names in self.origins.items()},
            "files": dict(self.files),
            "sha256": dict(self.sha256),
            "shared": dict(self.shared),
            "ties": dict(self.ties),
            "modules": {path: {"type": e.type, "config": dict(e.config)} for path, e in self.modules.items()},
            "record": dict(self.record),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str) -> "Manifest":
        """The manifest that `to_dict` wrote; a CheckpointError for anything else.  where: for messages"""
        table = _typed(data, dict, where, "the manifest")
        found = _typed(table.get("manifest"), int, where, "manifest")
        if found > VERSION:
            raise CheckpointError(
                f"{where} was written by qcore {table.get('qcore')} as manifest version {found}; this is qcore {qcore_version()}, which reads up to "
                f"{VERSION}: upgrade qcore"
            )
        if found < 1:
            raise CheckpointError(f"{where}: manifest version {found} does not exist")
        layout = table.get("layout")
        if layout not in ("compressed-tensors", "qcore"):
            raise CheckpointError(f"{where}: unknown layout {layout!r}; have: compressed-tensors, qcore")
        modules = {}
        for path, entry in _typed(table.get("modules"), dict, where, "modules").items():
            entry = _typed(entry, dict, where, f"modules[{path!r}]")
            modules[path] = ModuleEntry(
                _typed(entry.get("type"), str, where, f"modules[{path!r}].type"),
                _typed(entry.get("config"), dict, where, f"modules[{path!r}].config"),
            )
        files = _typed(table.get("files", {}), dict, where, "files")
        for name, size in files.items():
            _typed(size, int, where, f"files[{name!r}]")
            if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
                raise CheckpointError(f"{where} names a file outside its folder: {name!r}; refused")
        return cls(
            layout=layout,
            modules=modules,
            shared=_names(table, "shared", where),
            ties=_names(table, "ties", where),
            dtype=_typed(table.get("dtype", "float32"), str, where, "dtype"),
            source=_typed(table.get("source", ""), str, where, "source"),
            adapter=_typed(table.get("adapter", ""), str, where, "adapter"),
            origins={
                kind: _names(_typed(table.get("origins", {}), dict, where, "origins"), kind, where)
                for kind in _typed(table.get("origins", {}), dict, where, "origins")
            },
            files=files,
            sha256=_names(table, "sha256", where),
            record=_typed(table.get("record", {}), dict, where, "record"),
            written_by=_typed(table.get("qcore", "unknown"), str, where, "qcore"),
        )

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Of a checkpoint folder."""
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as e:
            raise CheckpointError(f"{folder} is no qcore checkpoint: it has no {MANIFEST}; pass the -o of `qcore quantize`") from e
        except (OSError, ValueError, RecursionError) as e:
            raise CheckpointError(f"{path} cannot be read ({e}); it is truncated or corrupt, fetch it again") from e
        return cls.from_dict(data, str(path))

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def require(self, registry: Any, where: str, *, adapter: bool = True) -> None:
        """CheckpointError when a class that the checkpoint needs is not installed; it names the distribution that had it.

        adapter: whether the adapter is needed too, not handed over by the caller
        """
        needs = needed_names(self.modules.values())
        if self.adapter and adapter:
            needs["adapters"].add(self.adapter)
        for kind, names in needs.items():
            shelf = getattr(registry, kind, {})
            for name in sorted(names):
                if name not in shelf:
                    origin = self.origins.get(kind, {}).get(name, "")
                    mend = f"pip install {origin}" if origin and origin != "qcore" else "upgrade qcore, or install the plug-in that brings it"
                    raise CheckpointError(
                        f"{where} needs the {kind[:-1]} {name!r}" + (f" of {origin}" if origin else "") + f", which is not there: {mend}"
                    )


def needed_names(entries: Iterable[ModuleEntry]) -> dict[str, set[str]]:
    """The names that entries stand on, by kind: module types, and the formats and packings in their configs."""
    needs: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for entry in entries:
        needs["modules"].add(entry.type)
        _walk(entry.config, needs)
    return needs


def _walk(value: Any, needs: dict[str, set[str]]) -> None:
    if isinstance(value, Mapping):
        fmt = value.get("format")
        if isinstance(fmt, Mapping) and isinstance(fmt.get("name"), str):
            needs["formats"].add(fmt["name"])
        if isinstance(value.get("packing"), str):
            needs["packings"].add(value["packing"])
        for inner in value.values():
            _walk(inner, needs)


def origins_of(needs: Mapping[str, Iterable[str]], registry: Any) -> dict[str, dict[str, str]]:
    """Which distribution brings each name."""
    return {
        kind: {name: getattr(getattr(registry, kind, None), "origin", {}).get(name, "") for name in sorted(names)}
        for kind, names in needs.items()
        if names
    }


def _typed(value: Any, kind: type, where: str, what: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{where}: {what} should be of type {kind.__name__}, got {value!r:.60}; the manifest is damaged, fetch it again")
    return value


def _names(table: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    found = _typed(table.get(key, {}), dict, where, key)
    for k, v in found.items():
        _typed(v, str, where, f"{key}[{k!r}]")
    return found
