"""Where strangers, and qcore's own classes, come in.

A plug-in is a distribution with an entry point in the group `qcore`; the module it names marks functions with `hookimpl`.  That import
is all a plug-in pays while it is only listed: the registry, and the torch of the classes it hands out, load when someone asks for them.
"""

from typing import TYPE_CHECKING, Any

from qcore.plugins.hookspecs import KINDS, PLUGIN_API, hookimpl, hookspec

if TYPE_CHECKING:
    from qcore.plugins.registry import PluginRecord, PluginWarning, Registry, Shelf, load_registry

__all__ = ["KINDS", "PLUGIN_API", "PluginRecord", "PluginWarning", "Registry", "Shelf", "hookimpl", "hookspec", "load_registry"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qcore.plugins import registry

    return getattr(registry, name)
