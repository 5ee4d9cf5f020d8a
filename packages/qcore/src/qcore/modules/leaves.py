"""Float layers as plain data: what an inserted module needs to build its children before they are filled or quantized."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from qcore.errors import SpecError

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_FIELDS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (*_CONV, "output_padding")),
}
_BY_NAME: dict[str, type[nn.Module]] = {cls.__name__.lower(): cls for cls in _FIELDS}


def leaf_config(leaf: nn.Module) -> dict[str, Any]:
    """JSON-ready: {"type": "conv2d", "in_channels": 3, …, "bias": True}; a Sequential of leaves is a list under "children"."""
    if type(leaf) is nn.Sequential:
        return {"type": "sequential", "children": [leaf_config(child) for child in leaf]}
    kind = _kind(leaf)
    fields = _FIELDS.get(kind)
    if fields is None:
        raise SpecError(f"{type(leaf).__name__} is not a layer that can be built from plain data; there are: {', '.join(_BY_NAME)}, sequential")
    values = {name: getattr(leaf, name) for name in fields}
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return {"type": kind.__name__.lower(), **config, "bias": getattr(leaf, "bias", None) is not None}


def _kind(leaf: nn.Module) -> type[nn.Module]:
    """The class that the leaf is built as: that of a float leaf of ours is the one that it is derived from."""
    return type(leaf).__bases__[1] if isinstance(leaf, _FloatLeaf) else type(leaf)


def build_leaf(config: Mapping[str, Any], build: type[nn.Module] | None = None) -> nn.Module:
    """The layer that `leaf_config` described, with parameters that nobody filled yet.  build: as which class; None = torch's own"""
    if config["type"] == "sequential":
        return nn.Sequential(*(build_leaf(child) for child in config["children"]))
    if config["type"] not in _BY_NAME:
        raise SpecError(f"unknown layer type {config['type']!r}; there are: {', '.join(_BY_NAME)}, sequential")
    cls = _BY_NAME[config["type"]]
    known = {*_FIELDS[cls], "bias"}
    if unknown := sorted(set(config) - known - {"type"}):
        raise SpecError(f"layer type {config['type']!r} has no field {unknown[0]!r}; it has: {', '.join(sorted(known))}")
    return (build or cls)(**{name: tuple(v) if isinstance(v, list) else v for name, v in config.items() if name != "type"})


class _FloatLeaf:
    """A float layer that a rewrite put in the place of another one of its kind, such as a convolution with a bias for one without."""

    name: ClassVar[str]

    def config(self) -> dict[str, Any]:
        return leaf_config(self)  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> nn.Module:
        return build_leaf(config, cls)  # type: ignore[arg-type]


class FloatLinear(_FloatLeaf, nn.Linear):
    name: ClassVar[str] = "float-linear"


class FloatConv1d(_FloatLeaf, nn.Conv1d):
    name: ClassVar[str] = "float-conv1d"


class FloatConv2d(_FloatLeaf, nn.Conv2d):
    name: ClassVar[str] = "float-conv2d"


class FloatConv3d(_FloatLeaf, nn.Conv3d):
    name: ClassVar[str] = "float-conv3d"


class FloatConvTranspose1d(_FloatLeaf, nn.ConvTranspose1d):
    name: ClassVar[str] = "float-convtranspose1d"


class FloatConvTranspose2d(_FloatLeaf, nn.ConvTranspose2d):
    name: ClassVar[str] = "float-convtranspose2d"


class FloatConvTranspose3d(_FloatLeaf, nn.ConvTranspose3d):
    name: ClassVar[str] = "float-convtranspose3d"


class Nothing(nn.Identity):
    """What is left where a module's work was taken over by another: a folded batch norm."""

    name: ClassVar[str] = "nothing"

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Nothing":
        return cls()


FLOAT_LEAVES: tuple[type[Any], ...] = (
    *(FloatLinear, FloatConv1d, FloatConv2d, FloatConv3d),
    *(FloatConvTranspose1d, FloatConvTranspose2d, FloatConvTranspose3d),
)
