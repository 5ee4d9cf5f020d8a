"""Which module takes the place of which float layer.

A plug-in teaches a layer class of its own with `leaf_by_type.register(ItsType)`, or layers without a common class with
`register_leaf(predicate, make)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from qcore.errors import SpecError
from qcore.model.layers import _is_transposed_linear
from qcore.modules.conv import QuantizedConv
from qcore.modules.embedding import QuantizedEmbedding
from qcore.modules.linear import QuantizedLinear
from qcore.numbers import QTensor, QuantSpec
from qcore.packing import Packing


@dataclass(frozen=True, kw_only=True)
class Stored:
    """All that a quantized leaf is made of, besides the float layer whose place it takes.

    weight:           the matrix [N, K] that a solver found
    bias:             None = the layer's own
    activation:       spec of the input; None = float
    activation_parts: scale and offset of a static activation
    online:           a module that the input goes through first
    """

    weight: QTensor
    packing: Packing
    bias: Tensor | None = None
    activation: QuantSpec | None = None
    activation_parts: Mapping[str, Tensor] = field(default_factory=dict)
    online: nn.Module | None = None

    def arguments(self) -> dict[str, Any]:
        """The first four of every leaf's constructor."""
        return {"parts": self.packing.pack(self.weight), "spec": self.weight.spec, "shape": self.weight.shape, "packing": self.packing}

    def bias_of(self, module: nn.Module) -> Tensor | None:
        return self.bias if self.bias is not None else getattr(module, "bias", None)


_BY_STRUCTURE: list[tuple[Callable[[nn.Module], bool], Callable[[Any, Stored], nn.Module]]] = []


def register_leaf(matches: Callable[[nn.Module], bool], make: Callable[[Any, Stored], nn.Module]) -> None:
    """Teach leaves by structure, for layers that share no class.  Later ones are asked first."""
    _BY_STRUCTURE.insert(0, (matches, make))


def quantized_leaf(module: nn.Module, stored: Stored) -> nn.Module:
    """The module that computes what `module` does, from a stored weight; a SpecError where nobody taught how."""
    for matches, make in _BY_STRUCTURE:
        if matches(module):
            return make(module, stored)
    return leaf_by_type(module, stored)


@singledispatch
def leaf_by_type(module: nn.Module, stored: Stored) -> nn.Module:
    """The rule of a layer class; extend with `@leaf_by_type.register`."""
    raise SpecError(
        f"no quantized module is known for {type(module).__name__}; register one with "
        f"`qcore.modules.replace.leaf_by_type.register({type(module).__name__})` in the plug-in that owns this layer"
    )


def _own_forward(module: nn.Module, base: type[nn.Module]) -> None:
    """SpecError for a subclass with a forward of its own: what it does beside (a scaled embedding, a LoRA branch) would be lost in silence."""
    if type(module).forward is not base.forward:
        raise SpecError(
            f"{type(module).__name__} is derived from {base.__name__} and has a forward of its own, which a quantized {base.__name__} would not run; "
            f"leave it float, or register a leaf for {type(module).__name__}"
        )


def _no_online(stored: Stored, what: str) -> None:
    if stored.online is not None:
        raise SpecError(f"{what} has no input that a module could rotate; drop the online transform of this site")


def _linear(module: nn.Module, stored: Stored, transposed: bool = False) -> nn.Module:
    return QuantizedLinear(
        **stored.arguments(),
        bias=stored.bias_of(module),
        activation=stored.activation,
        activation_parts=stored.activation_parts,
        online=stored.online,
        transposed=transposed,
    )


@leaf_by_type.register
def _(module: nn.Linear, stored: Stored) -> nn.Module:
    _own_forward(module, nn.Linear)
    return _linear(module, stored)


@leaf_by_type.register(nn.Conv1d)
@leaf_by_type.register(nn.Conv2d)
@leaf_by_type.register(nn.Conv3d)
def _(module: Any, stored: Stored) -> nn.Module:
    base = next(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c))
    _own_forward(module, base)
    _no_online(stored, "a convolution")
    return QuantizedConv(
        **stored.arguments(),
        geometry=QuantizedConv.geometry_of(module),
        bias=stored.bias_of(module),
        activation=stored.activation,
        activation_parts=stored.activation_parts,
    )


@leaf_by_type.register
def _(module: nn.Embedding, stored: Stored) -> nn.Module:
    _own_forward(module, nn.Embedding)
    _no_online(stored, "an embedding")
    if stored.activation is not None:
        raise SpecError("the input of an embedding is an index; it cannot be quantized")
    if module.max_norm is not None:
        raise SpecError(f"an embedding with max_norm={module.max_norm} changes its table when it runs; leave it float")
    dtype = module.weight.dtype if module.weight.dtype.is_floating_point else torch.float32
    return QuantizedEmbedding(**stored.arguments(), dtype=dtype)


# transformers' Conv1D (GPT-2) keeps its weight [K, N]; as a matrix it is a linear layer like any other
register_leaf(lambda module: _is_transposed_linear(module, "weight"), lambda module, stored: _linear(module, stored, transposed=True))


# fused stacks: several matrices in one module, each solved apart -------------------------------------------------------------------------

Pieces = Mapping[tuple[str, int | None], Stored]
_STACKS: list[tuple[Callable[[nn.Module], bool], Callable[[Any, Pieces], nn.Module]]] = []


def register_stack(matches: Callable[[nn.Module], bool], make: Callable[[Any, Pieces], nn.Module]) -> None:
    """Teach the quantized form of a module with several matrices (fused experts): `make(module, {(parameter, part): stored})`."""
    _STACKS.insert(0, (matches, make))


def quantized_stack(module: nn.Module, pieces: Pieces) -> nn.Module:
    """The module that computes what a fused stack does, from its parts; a SpecError where nobody taught how."""
    for matches, make in _STACKS:
        if matches(module):
            return make(module, pieces)
    names = ", ".join(f"{name}" if part is None else f"{name}[{part}]" for name, part in list(pieces)[:3])
    raise SpecError(
        f"no quantized module is known for {type(module).__name__} with its parts {names} …; register one with "
        "`qcore.modules.replace.register_stack` in the plug-in that owns this layer"
    )
