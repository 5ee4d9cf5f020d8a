"""Every module that a checkpoint may contain is registered, and is rebuilt from plain data."""

from typing import Any, ClassVar, Protocol, Self


class RuntimeModule(Protocol):
    """A module that takes a float leaf's place, stands before one, or sits at a tap; also an `nn.Module`.

    name:   lower case; stands in the manifest
    config: JSON-ready; `from_config(config())` makes the same module with empty buffers, which `load_state_dict` fills
    """

    name: ClassVar[str]

    def config(self) -> dict[str, Any]: ...

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self: ...
