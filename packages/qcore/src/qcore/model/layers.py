"""The one file that knows how each layer type lays out its weight.

Everything above it sees a weight as a matrix [N, K] (N output channels, K inputs to each), its input as rows [T, K], and the channels of an axis
as a last dimension.  A plug-in teaches a new layer type with `layout.register(ItsType)`; layers without a common class (fused experts,
transformers' Conv1D) are known by predicates, `register_predicate`.

Groups of a convolution are *parts*: their rows see different inputs, so `rows` returns [P, T, K] and a Gram matrix [P, K, K]; the weight matrix
is [P·n, K] all the same, rows of one part together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.errors import SpecError
from qcore.model.topology import Axis


@dataclass(frozen=True)
class Layout:
    """How one parameter of one module lies.

    matrix:   the parameter as [N, K]
    tensor:   the inverse of `matrix`; also takes the parameter's shape
    rows:     the module's input as [T, K], one row for each dot product; [P, T, K] with parts
    channels: the parameter with the channels of an axis as its last dimension, and the way back
    parts:    P
    piece:    one part of a fused stack as [n, K], a view; None where there are no stacks
    """

    matrix: Callable[[Tensor], Tensor]
    tensor: Callable[[Tensor, torch.Size], Tensor]
    rows: Callable[[Tensor], Tensor]
    channels: Callable[[Tensor, Axis], tuple[Tensor, Callable[[Tensor], Tensor]]]
    parts: int = 1
    piece: Callable[[Tensor, int], Tensor] | None = None


Predicate = Callable[[nn.Module, str], bool]
_PREDICATES: list[tuple[Predicate, Callable[[nn.Module, str], Layout]]] = []


def register_predicate(matches: Predicate, make: Callable[[nn.Module, str], Layout]) -> None:
    """Teach layouts by structure, for modules that share no class: `matches(module, parameter name)`.  Later ones are asked first."""
    _PREDICATES.insert(0, (matches, make))


def layout(module: nn.Module, name: str = "weight") -> Layout:
    """How the parameter `name` of `module` lies; a SpecError where nobody taught it."""
    param = getattr(module, name, None)
    if isinstance(param, Tensor) and param.ndim == 1:
        return VECTOR
    for matches, make in _PREDICATES:
        if matches(module, name):
            return make(module, name)
    return by_type(module, name)


@singledispatch
def by_type(module: nn.Module, name: str) -> Layout:
    """The rule of a layer class; extend with `@by_type.register`."""
    raise SpecError(
        f"no layout is known for {type(module).__name__}.{name}; register one with `qcore.model.layers.by_type.register({type(module).__name__})` "
        "in the plug-in that owns this layer"
    )


def _along(dim: int) -> Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]:
    return lambda w: (w.movedim(dim, -1), lambda c: c.movedim(-1, dim))


def _matrix_channels(out: int, into: int) -> Callable[[Tensor, Axis], tuple[Tensor, Callable[[Tensor], Tensor]]]:
    return lambda w, axis: _along(out if axis == "out" else into)(w)


def _flat_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _no_rows(x: Tensor) -> Tensor:
    raise SpecError("this parameter has no input rows: nothing is multiplied with it as a matrix")


VECTOR = Layout(
    matrix=lambda w: w.unsqueeze(0),
    tensor=lambda m, shape: m.reshape(shape),
    rows=_flat_rows,
    channels=_matrix_channels(0, 0),
)
LINEAR = Layout(matrix=lambda w: w, tensor=lambda m, shape: m.reshape(shape), rows=_flat_rows, channels=_matrix_channels(0, 1))
_TRANSPOSED = Layout(matrix=lambda w: w.T, tensor=lambda m, shape: m.T.reshape(shape), rows=_flat_rows, channels=_matrix_channels(1, 0))
# a table of rows: what it "writes" is a row's channels, the vocabulary is its input
_TABLE = Layout(matrix=lambda w: w, tensor=lambda m, shape: m.reshape(shape), rows=_no_rows, channels=_matrix_channels(1, 0))


@by_type.register
def _(module: nn.Linear, name: str) -> Layout:
    return LINEAR


@by_type.register
def _(module: nn.Embedding, name: str) -> Layout:
    return _TABLE


@by_type.register(nn.Conv1d)
@by_type.register(nn.Conv2d)
@by_type.register(nn.Conv3d)
def _(module: Any, name: str) -> Layout:
    groups: int = module.groups

    def channels(w: Tensor, axis: Axis) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if axis == "out" or groups == 1:
            return _along(0 if axis == "out" else 1)(w)
        # input channel g·(K/groups) + j stands at w[rows of group g, j]
        n, k, *kernel = w.shape
        split = w.reshape(groups, n // groups, k, *kernel).movedim(0, -1).movedim(1, -1)  # [N/g, *kernel, g, K/g]
        return split.flatten(-2), lambda c: c.unflatten(-1, (groups, k)).movedim(-1, 1).movedim(-1, 0).reshape(w.shape)

    def rows(x: Tensor) -> Tensor:
        patches = unfold(x, module.kernel_size, module.stride, _padding(module), module.dilation, module.padding_mode)  # [B, C·k, L]
        b, _, positions = patches.shape
        split = patches.reshape(b, groups, -1, positions).permute(1, 0, 3, 2)  # [g, B, L, K]
        return split.reshape(groups, b * positions, -1) if groups > 1 else split.reshape(b * positions, -1)

    return Layout(matrix=lambda w: w.flatten(1), tensor=lambda m, shape: m.reshape(shape), rows=rows, channels=channels, parts=groups)


@by_type.register(nn.ConvTranspose1d)
@by_type.register(nn.ConvTranspose2d)
@by_type.register(nn.ConvTranspose3d)
def _(module: Any, name: str) -> Layout:
    """[C, N/groups, *kernel]: input channels lie first.  Its input has no rows: every position is multiplied with the whole kernel at once."""
    groups: int = module.groups

    def matrix(w: Tensor) -> Tensor:
        return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)  # [N, C/g · k]

    def tensor(m: Tensor, shape: torch.Size) -> Tensor:
        c, n, *kernel = shape
        return m.reshape(groups, n, c // groups, *kernel).transpose(1, 2).reshape(shape)

    def channels(w: Tensor, axis: Axis) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if axis == "in" or groups == 1:
            return _along(0 if axis == "in" else 1)(w)
        # output channel g·(N/groups) + j stands at w[inputs of group g, j]
        split = w.unflatten(0, (groups, -1)).movedim(0, -1).movedim(1, -1)  # [C/g, *kernel, g, N/g]
        return split.flatten(-2), lambda c: c.unflatten(-1, (groups, -1)).movedim(-1, 1).movedim(-1, 0).flatten(0, 1)

    return Layout(matrix=matrix, tensor=tensor, rows=_no_rows, channels=channels, parts=groups)


def _padding(module: Any) -> tuple[tuple[int, int], ...]:
    """(before, after) of each spatial axis; "same" padding is uneven for even kernels."""
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    if module.padding == "valid":
        return tuple((0, 0) for _ in module.kernel_size)
    return tuple((p, p) for p in module.padding)


def unfold(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[tuple[int, int], ...], dilation: tuple[int, ...], mode: str = "zeros"
) -> Tensor:
    """Patches of any number of spatial axes.  [B, C, *spatial] → [B, C·prod(kernel), L], in the order of `w.flatten(1)`"""
    sides = [side for before, after in reversed(padding) for side in (before, after)]
    if any(sides):
        x = F.pad(x, sides, mode="constant" if mode == "zeros" else mode)
    n = len(kernel)
    for i in range(n):
        axis = 2 + i
        span = dilation[i] * (kernel[i] - 1) + 1
        x = x.unfold(axis, span, stride[i])[..., :: dilation[i]]  # the window becomes the last axis
    # [B, C, *out, *kernel] → [B, C, *kernel, *out]
    x = x.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
    return x.flatten(1, 1 + n).flatten(2)


def _is_transposed_linear(module: nn.Module, name: str) -> bool:
    """transformers' Conv1D (GPT-2): weight [K, N], known by its `nf` and the missing kernel."""
    weight = getattr(module, "weight", None)
    return name == "weight" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2 and not hasattr(module, "kernel_size")


def stack_layout(*, transposed: bool = False) -> Layout:
    """A fused stack of matrices, [E, N, K] or transposed [E, K, N]: parts are the experts, rows of one expert lie together."""
    out, into = (2, 1) if transposed else (1, 2)

    def matrix(w: Tensor) -> Tensor:
        return (w.transpose(1, 2) if transposed else w).flatten(0, 1)

    def tensor(m: Tensor, shape: torch.Size) -> Tensor:
        return m.reshape(shape[0], shape[2], shape[1]).transpose(1, 2) if transposed else m.reshape(shape)

    def piece(w: Tensor, part: int) -> Tensor:
        return w[part].T if transposed else w[part]

    return Layout(matrix=matrix, tensor=tensor, rows=_flat_rows, channels=_matrix_channels(out, into), piece=piece)


register_predicate(_is_transposed_linear, lambda module, name: _TRANSPOSED)
register_predicate(
    lambda module, name: isinstance(getattr(module, name, None), Tensor) and getattr(module, name).ndim == 3 and not hasattr(module, "kernel_size"),
    lambda module, name: stack_layout(transposed=bool(getattr(module, "is_transposed", False))),
)
