"""Float layers as plain data: what an inserted module needs to build its children before they are filled or quantized."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qcore.errors import SpecError

_FIELDS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.Conv3d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
}
_BY_NAME: dict[str, type[nn.Module]] = {cls.__name__.lower(): cls for cls in _FIELDS}


def leaf_config(leaf: nn.Module) -> dict[str, Any]:
    """JSON-ready: {"type": "conv2d", "in_channels": 3, …, "bias": True}; a Sequential of leaves is a list under "children"."""
    if type(leaf) is nn.Sequential:
        return {"type": "sequential", "children": [leaf_config(child) for child in leaf]}
    fields = _FIELDS.get(type(leaf))
    if fields is None:
        raise SpecError(f"{type(leaf).__name__} is not a layer that can be built from plain data; there are: {', '.join(_BY_NAME)}, sequential")
    values = {name: getattr(leaf, name) for name in fields}
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return {"type": type(leaf).__name__.lower(), **config, "bias": getattr(leaf, "bias", None) is not None}


def build_leaf(config: Mapping[str, Any]) -> nn.Module:
    """The layer that `leaf_config` described, with parameters that nobody filled yet."""
    if config["type"] == "sequential":
        return nn.Sequential(*(build_leaf(child) for child in config["children"]))
    if config["type"] not in _BY_NAME:
        raise SpecError(f"unknown layer type {config['type']!r}; there are: {', '.join(_BY_NAME)}, sequential")
    cls = _BY_NAME[config["type"]]
    known = {*_FIELDS[cls], "bias"}
    if unknown := sorted(set(config) - known - {"type"}):
        raise SpecError(f"layer type {config['type']!r} has no field {unknown[0]!r}; it has: {', '.join(sorted(known))}")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in config.items() if name != "type"})
