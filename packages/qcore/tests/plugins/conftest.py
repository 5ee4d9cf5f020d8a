import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from qcore.plugins import Registry, hookimpl, load_registry

HEAD = "from qcore.plugins import hookimpl\n\n\n"

TERNARY = (
    HEAD
    + """class Ternary:
    name = "ternary"


@hookimpl
def qcore_formats():
    return [Ternary]
"""
)


class Int:
    name = "int"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a distribution on the path, as an installer would: a `dist-info` folder and a module of its own."""
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(root)

    def install(distribution: str, source: str = TERNARY, *, name: str = "", version: str = "0.1", module: str = "") -> None:
        name = name or distribution.removeprefix("qplug-")
        module = module or distribution.replace("-", "_")
        (root / f"{module}.py").write_text(source)
        info = root / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[qcore]\n{name} = {module}\n")
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield install
    for module in set(sys.modules) - before:
        if not module.startswith("qcore"):
            del sys.modules[module]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Registry]:
    """The registry of what `install` put there, and of nothing else that happens to be installed; one built-in: the format `int`."""
    monkeypatch.delenv("QCORE_PLUGINS", raising=False)
    builtin = types.ModuleType("qcore.builtin")
    builtin.qcore_formats = hookimpl(lambda: [Int])
    monkeypatch.setitem(sys.modules, "qcore.builtin", builtin)
    monkeypatch.setattr("qcore.plugins.registry.distributions", lambda: importlib.metadata.distributions(path=[str(tmp_path / "site")]))
    load_registry.cache_clear()
    yield load_registry
    load_registry.cache_clear()
