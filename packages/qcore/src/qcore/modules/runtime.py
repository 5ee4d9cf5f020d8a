"""Every module that a checkpoint may contain is registered, and is rebuilt from plain data."""

import inspect
import re
from typing import Any, ClassVar, Protocol, Self

from torch import nn

from qcore.errors import SpecError
from qcore.model.tap import attach

_HANDLER = re.compile(r"^(?:(?P<owner>.+)\.)?taps\.(?P<key>[^.]+)\.handlers\.\d+$")


class RuntimeModule(Protocol):
    """A module that takes a float leaf's place, stands before one, or sits at a tap; also an `nn.Module`.

    name:   lower case; stands in the manifest
    config: JSON-ready; `from_config(config())` makes the same module with empty buffers, which `load_state_dict` fills

    Registered modules inside another one (`online`, the leaves of a sum) are no part of its config: each has an entry of its own under its path.
    A `from_config` whose config names formats or packings takes a second parameter, `registry`, and is given the one that is loading.
    """

    name: ClassVar[str]

    def config(self) -> dict[str, Any]: ...

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self: ...


def rebuild(cls: type, config: dict[str, Any], registry: Any) -> nn.Module:
    """`cls.from_config(config)`, with the registry where it asks for one."""
    make = cls.from_config  # type: ignore[attr-defined]
    return make(config, registry=registry) if "registry" in inspect.signature(make).parameters else make(config)


def module_name(module: nn.Module, modules: Any) -> str | None:
    """The name under which the class of `module` is registered in `modules`; None for everything else.

    modules: classes by name, such as `load_registry().modules`
    """
    name = getattr(type(module), "name", None)
    if not isinstance(name, str) or not callable(getattr(type(module), "from_config", None)):
        return None
    if name not in modules or modules[name] is not type(module):
        raise SpecError(f"{type(module).__qualname__} is a run-time module that is not registered as {name!r}; return it from the hook qcore_modules")
    return name


def place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` below `model`, in place, also where a parameter is (the stack of fused experts takes its name).

    Handlers of taps are attached in the order in which they are placed.

    AttributeError where the module above it does not exist.
    """
    if match := _HANDLER.match(path):
        tensor, _, part = match["key"].partition("@")
        attach(model.get_submodule(match["owner"] or ""), tensor.replace("/", "."), module, int(part) if part else None)  # type: ignore[arg-type]
        return
    parent, _, own = path.rpartition(".")
    owner = model.get_submodule(parent)
    owner._parameters.pop(own, None)
    setattr(owner, own, module)
