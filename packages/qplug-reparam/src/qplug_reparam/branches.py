"""Blocks of parallel branches, found by structure: what is summed, and of which convolutions and batch norms it is made.

Every module of a model is traced on its own with `torch.fx`, the innermost first.  A value is *affine* in a tensor x if it is made of x by
convolutions of x, batch norms and sums alone; a block of branches is an affine value of at least two terms, such as RepVGG's

    y = BN₃(conv₃ₓ₃(x)) + BN₁(conv₁ₓ₁(x)) + BN(x)

or RepViT's BN(BN(conv(x)) + conv₁ₓ₁(x) + x).  Such a value is one convolution with a bias, whatever the block is called and however many branches of
whatever kernel it has.  What follows (an activation, squeeze-and-excitation) stays as it is.

Left out: convolutions of convolutions (a 1 × 1 before a 3 × 3, as in diverse branch blocks), average pooling as a branch, transposed convolutions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import add, iadd
from typing import Any

import torch
from qcore.errors import SpecError
from torch import fx, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# what timm calls the one convolution
FUSED = "reparam_conv"
_SAME = (nn.Identity, nn.Dropout, nn.Dropout2d)
_ADD = (add, iadd, torch.add)


@dataclass(frozen=True)
class Input:
    """x itself."""


@dataclass(frozen=True)
class Conv:
    """The convolution at `path` of x.

    padding: zeros on each side of (height, width)
    """

    path: str
    padding: tuple[int, int]


@dataclass(frozen=True)
class Norm:
    """The batch norm at `path` of `of`."""

    path: str
    of: "Expr"
    eps: float


@dataclass(frozen=True)
class Sum:
    terms: tuple["Expr", ...]


Expr = Input | Conv | Norm | Sum


@dataclass(frozen=True)
class Geometry:
    """The one convolution that a block's branches are together.

    kernel, padding: of both axes, (height, width); all others as of nn.Conv2d
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Branches:
    """A block of branches.

    module:   path of the module in whose forward they are summed
    sum:      what is summed; paths are those of the whole model
    geometry: of the convolution that takes their place
    name:     of that convolution: "<module>.reparam_conv", as timm calls it
    """

    module: str
    sum: Expr
    geometry: Geometry
    name: str

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the convolutions and batch norms that are gone once they are fused."""
        return tuple(_paths(self.sum))

    @property
    def branched(self) -> bool:
        """False for a convolution and its batch norm alone."""
        return terms(self.sum) > 1


@dataclass
class Found:
    """Branches, and the traced forward in which they stand."""

    branches: Branches
    graph: fx.Graph
    base: fx.Node
    end: fx.Node
    inside: tuple[fx.Node, ...]


def find_branches(model: nn.Module) -> tuple[Branches, ...]:
    """All blocks of branches of a model; looks at structure alone, parameters may be on meta."""
    claimed: set[int] = set()
    return tuple(found.branches for path, module in innermost_first(model) for found in traced_branches(path, module, claimed))


def innermost_first(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all modules that have children, children before parents.  Names may be replaced while going."""
    for name, child in list(model.named_children()):
        yield from innermost_first(child, f"{path}.{name}" if path else name)
    chain = isinstance(model, (*NORMS, nn.Sequential, nn.ModuleList, nn.ModuleDict))
    if any(True for _ in model.children()) and (not chain or (isinstance(model, nn.Sequential) and not path)):
        yield path, model


def require_eval(model: nn.Module) -> None:
    """SpecError where a batch norm would take the statistics of the batch: what it computes then is no convolution."""
    for path, module in model.named_modules():
        if isinstance(module, NORMS) and module.training:
            raise SpecError(
                f"{path} is in training mode: it normalizes with the statistics of each batch, which no convolution does; call model.eval() first"
            )


def traced_branches(path: str, module: nn.Module, claimed: set[int], pairs: bool = False) -> list[Found]:
    """The blocks of branches that are summed in `module`'s own forward.

    claimed: ids of modules that are or hold a block already; they are traced as a whole, and `module` joins them where it has one
    pairs:   also a convolution and its batch norm alone, a block of one branch
    """
    if not _worth_tracing(module, claimed):
        return []
    tracer = _Tracer(claimed)
    try:
        graph = tracer.trace(module)
    except Exception:  # whatever a forward does with a traced tensor: then it is no plain sum of branches
        return []
    found = _Reading(path, module, graph).found(pairs)
    if found:
        claimed.add(id(module))
    return found


def _worth_tracing(module: nn.Module, claimed: set[int]) -> bool:
    """Whether there are convolutions below it that no block inside has claimed."""
    free = _unclaimed(module, claimed)
    convs = sum(type(m) is nn.Conv2d for m in free)
    return convs >= 2 or (convs >= 1 and any(isinstance(m, NORMS) for m in free))


def _unclaimed(module: nn.Module, claimed: set[int]) -> list[nn.Module]:
    found = [module]
    for child in module.children():
        if id(child) not in claimed:
            found += _unclaimed(child, claimed)
    return found


class _Tracer(fx.Tracer):
    def __init__(self, claimed: set[int]) -> None:
        super().__init__()
        self.claimed = claimed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NORMS) or id(m) in self.claimed or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Affine:
    """A node's value: an expression in that of `base`, and the nodes between."""

    base: fx.Node
    expr: Expr
    nodes: tuple[fx.Node, ...]


class _Reading:
    """One traced forward: which of its nodes are affine in which."""

    def __init__(self, path: str, module: nn.Module, graph: fx.Graph) -> None:
        self.path, self.module, self.graph = path, module, graph
        self.values: dict[fx.Node, _Affine] = {}

    def found(self, pairs: bool) -> list[Found]:
        for node in self.graph.nodes:
            value = self._value(node)
            if value is not None and self._alone(value, node):
                self.values[node] = value
        ends = [n for n, v in self.values.items() if (terms(v.expr) > 1 or (pairs and _is_pair(v.expr))) and not self._goes_on(n)]
        found = []
        for i, end in enumerate(ends):
            value = self.values[end]
            geometry = geometry_of(value.expr, self.module)
            if geometry is None:
                continue
            name = FUSED if len(ends) == 1 else f"{FUSED}_{i}"
            whole = Branches(self.path, _prefixed(value.expr, self.path), geometry, f"{self.path}.{name}" if self.path else name)
            found.append(Found(whole, self.graph, value.base, end, value.nodes))
        return found

    def _value(self, node: fx.Node) -> _Affine | None:
        inputs = node.all_input_nodes
        if node.op == "call_module" and len(inputs) == 1:
            module, own = self.module.get_submodule(str(node.target)), inputs[0]
            below = self.values.get(own)
            padding = padding_of(module) if type(module) is nn.Conv2d and module.padding_mode == "zeros" else None
            if padding is not None:
                return _Affine(own, Conv(str(node.target), padding), (node,))
            if foldable(module):
                base, expr, nodes = (own, Input(), ()) if below is None else (below.base, below.expr, below.nodes)
                return _Affine(base, Norm(str(node.target), expr, float(module.eps)), (*nodes, node))  # type: ignore[arg-type]
            if isinstance(module, _SAME):
                return None if below is None else _Affine(below.base, below.expr, (*below.nodes, node))
        if node.op in ("call_function", "call_method") and (node.target in _ADD or node.target in ("add", "add_")):
            return self._sum(node, inputs)
        return None

    def _sum(self, node: fx.Node, inputs: list[fx.Node]) -> _Affine | None:
        if node.kwargs or any(not isinstance(a, fx.Node) and a != 0 for a in node.args):
            return None
        if len(inputs) == 1:  # 0 + branch, with which a loop over branches begins
            own = self.values.get(inputs[0])
            return own if own is None else _Affine(own.base, own.expr, (*own.nodes, node))
        if len(inputs) != 2:
            return None
        one, other = (self._as_term(a, b) for a, b in (inputs, inputs[::-1]))
        if one is None or other is None or one.base is not other.base:
            return None
        expr = Sum((*_terms_of(one.expr), *_terms_of(other.expr)))
        if geometry_of(expr, self.module) is None:
            return None
        return _Affine(one.base, expr, tuple(dict.fromkeys((*one.nodes, *other.nodes, node))))

    def _as_term(self, node: fx.Node, beside: fx.Node) -> _Affine | None:
        """The node's value; x itself where the other addend is made of this very node."""
        other = self.values.get(beside)
        if other is not None and other.base is node:
            return _Affine(node, Input(), ())
        return self.values.get(node)

    def _alone(self, value: _Affine, end: fx.Node) -> bool:
        """Whether nothing but the value itself reads what it is made of."""
        inside = set(value.nodes)
        return all(user in inside for node in value.nodes if node is not end for user in node.users)

    def _goes_on(self, node: fx.Node) -> bool:
        """Whether a larger value of the same branches contains this one."""
        return any(
            user in self.values and self.values[user].base is self.values[node].base and node in self.values[user].nodes for user in node.users
        )


def foldable(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics of its own, and nothing else (timm's may hold an activation)."""
    return isinstance(module, NORMS) and module.running_mean is not None and all(isinstance(m, nn.Identity) for m in module.children())


def terms(expr: Expr) -> int:
    """How many branches an expression has."""
    match expr:
        case Norm():
            return terms(expr.of)
        case Sum():
            return sum(map(terms, expr.terms))
    return 1


def _is_pair(expr: Expr) -> bool:
    return isinstance(expr, Norm) and isinstance(expr.of, Conv | Norm) and terms(expr) == 1 and any(isinstance(leaf, Conv) for leaf in leaves(expr))


def _terms_of(expr: Expr) -> tuple[Expr, ...]:
    return expr.terms if isinstance(expr, Sum) else (expr,)


def _paths(expr: Expr) -> Iterator[str]:
    match expr:
        case Conv():
            yield expr.path
        case Norm():
            yield from _paths(expr.of)
            yield expr.path
        case Sum():
            for term in expr.terms:
                yield from _paths(term)


def _prefixed(expr: Expr, prefix: str) -> Expr:
    if not prefix:
        return expr
    match expr:
        case Conv():
            return Conv(f"{prefix}.{expr.path}", expr.padding)
        case Norm():
            return Norm(f"{prefix}.{expr.path}", _prefixed(expr.of, prefix), expr.eps)
        case Sum():
            return Sum(tuple(_prefixed(t, prefix) for t in expr.terms))
    return expr


def leaves(expr: Expr) -> Iterator[Input | Conv]:
    """What the branches start with, in order."""
    match expr:
        case Norm():
            yield from leaves(expr.of)
        case Sum():
            for term in expr.terms:
                yield from leaves(term)
        case _:
            yield expr


def geometry_of(expr: Expr, module: nn.Module) -> Geometry | None:
    """The convolution that the branches are together; None where they are none: strides, groups or positions differ, or a sum is broadcast."""
    convs: list[Any] = [module.get_submodule(leaf.path) for leaf in leaves(expr) if isinstance(leaf, Conv)]
    if not convs:
        return None
    first = convs[0]
    inputs, outputs, groups, stride = first.in_channels, first.out_channels, first.groups, tuple(first.stride)
    if any((c.in_channels, c.out_channels, c.groups, tuple(c.stride)) != (inputs, outputs, groups, stride) for c in convs):
        return None
    dilations = {tuple(c.dilation) for c in convs if max(c.kernel_size) > 1}
    if len(dilations) > 1:
        return None
    dilation = next(iter(dilations), (1, 1))
    taps = [(tuple(c.kernel_size), padding_of(c) or (0, 0)) for c in convs]
    if any(isinstance(leaf, Input) for leaf in leaves(expr)):
        if inputs != outputs or stride != (1, 1):
            return None
        taps.append(((1, 1), (0, 0)))
    height, width = (_size(taps, axis, dilation[axis]) for axis in (0, 1))
    if height is None or width is None:
        return None
    (kh, ph), (kw, pw) = height, width
    return Geometry(inputs, outputs, (kh, kw), stride, (ph, pw), dilation, groups)


def _size(taps: list[tuple[tuple[int, ...], tuple[int, int]]], axis: int, dilation: int) -> tuple[int, int] | None:
    """(kernel, padding) that cover all branches of one axis; None where their taps do not lie on one grid, or their outputs differ in size."""
    sides = [(kernel[axis], padding[axis]) for kernel, padding in taps]
    widest = max(p for _, p in sides)
    # outputs are of one size if 2p - d(k - 1) is the same for all
    if len({2 * p - dilation * (k - 1) for k, p in sides}) != 1 or any((widest - p) % dilation for _, p in sides):
        return None
    return max(k + 2 * ((widest - p) // dilation) for k, p in sides), widest


def padding_of(conv: Any) -> tuple[int, int] | None:
    """Zeros on each side of (height, width) of a convolution; None where "same" padding is uneven."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in totals) else (totals[0] // 2, totals[1] // 2)
    height, width = conv.padding
    return height, width
