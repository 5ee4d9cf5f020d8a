"""Fuse the branches of a block, and their batch norms, into one convolution with a bias: exact in float64.

For a batch norm with t = γ / √(var + ε): K' = K·t, b' = β - mean·t, for each output channel.  A smaller kernel is padded to the larger one's size; x
itself is a kernel of one tap, 1 at input channel i mod (C_in / groups) of output channel i.  Kernels and biases add up.

Two doors.  `fuse(model)` is for a model in memory.  `fuse_structure` and `FusedReader` are for sources: the skeleton is fused without any value, and
each fused tensor is computed when it is asked for, so a model on disk is never in memory whole.

Source: https://arxiv.org/abs/2101.03697 (RepVGG), section 3.3.  Defects of released code that are avoided here: timm 1.0's
`RepVggBlock(inference_mode=True)` builds the fused convolution without padding, and its RepViT pads the 1 × 1 kernel by one ring whatever the other
kernel's size is; both fuse in the weights' own float32.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from qcore.errors import NotFound, SpecError, at
from qcore.model.reader import DictReader, TensorReader
from torch import Tensor, fx, nn

from qplug_reparam.branches import (
    Branches,
    Conv,
    Expr,
    Found,
    Geometry,
    Input,
    Norm,
    find_branches,
    innermost_first,
    leaves,
    require_eval,
    traced_branches,
)


@dataclass(frozen=True)
class Folded:
    """The values of a block, branch by branch, batch norms folded in; float64.

    kernels: branch → [N, C_in / groups, kh, kw], all of the fused size; they add up to the fused kernel
    bias:    [N], of all branches together
    silent:  batch norm → its channels whose running variance is zero: they never varied in training, and their gain is γ / √ε
    """

    kernels: Mapping[str, Tensor]
    bias: Tensor
    silent: Mapping[str, tuple[int, ...]]

    @property
    def kernel(self) -> Tensor:
        return torch.stack(tuple(self.kernels.values())).sum(0)


def fold(branches: Branches, reader: TensorReader) -> Folded:
    """The values of one block, from its branches' own tensors."""
    with at(branches.module or "the model"):
        folding = _Folding(branches.geometry, reader)
        kernels, bias = folding.of(branches.sum, branches.module)
        return Folded(kernels, bias, folding.silent)


class _Folding:
    def __init__(self, geometry: Geometry, reader: TensorReader) -> None:
        self.geometry, self.reader = geometry, reader
        self.silent: dict[str, tuple[int, ...]] = {}

    def of(self, expr: Expr, module: str) -> tuple[dict[str, Tensor], Tensor]:
        """(branch → kernel, bias) of an expression."""
        match expr:
            case Input():
                return {"skip": self._identity()}, torch.zeros(self.geometry.out_channels, dtype=torch.float64)
            case Conv():
                return {_branch_name(expr.path, module): self._kernel(expr)}, self._vector(f"{expr.path}.bias", 0.0)
            case Norm():
                kernels, bias = self.of(expr.of, module)
                if list(kernels) == ["skip"]:
                    kernels = {_branch_name(expr.path, module): kernels["skip"]}
                gain, shift = self._norm(expr)
                return {name: k * gain.view(-1, 1, 1, 1) for name, k in kernels.items()}, bias * gain + shift
        parts = [self.of(term, module) for term in expr.terms]
        kernels = {}
        for own, _ in parts:
            for name, kernel in own.items():
                kernels[name] = kernels[name] + kernel if name in kernels else kernel
        return kernels, torch.stack([bias for _, bias in parts]).sum(0)

    def _identity(self) -> Tensor:
        """x as a kernel: one tap in the middle, at input channel i mod (C_in / groups) of output i."""
        g = self.geometry
        per_group = g.in_channels // g.groups
        kernel = torch.zeros(g.out_channels, per_group, *g.kernel, dtype=torch.float64)
        i = torch.arange(g.out_channels)
        kernel[i, i % per_group, g.padding[0] // g.dilation[0], g.padding[1] // g.dilation[1]] = 1
        return kernel

    def _kernel(self, conv: Conv) -> Tensor:
        g = self.geometry
        own = self.reader[f"{conv.path}.weight"].double()
        kernel = torch.zeros(g.out_channels, g.in_channels // g.groups, *g.kernel, dtype=torch.float64)
        top, left = ((g.padding[i] - conv.padding[i]) // g.dilation[i] for i in (0, 1))
        kernel[:, :, top : top + own.shape[2], left : left + own.shape[3]] = own
        return kernel

    def _vector(self, name: str, default: float) -> Tensor:
        if name in self.reader:
            return self.reader[name].double()
        return torch.full((self.geometry.out_channels,), default, dtype=torch.float64)

    def _norm(self, norm: Norm) -> tuple[Tensor, Tensor]:
        """(t, β - mean·t)."""
        variance = self.reader[f"{norm.path}.running_var"].double()
        spread = variance + norm.eps
        if not bool((spread > 0).all()):
            channel = int((~(spread > 0)).nonzero()[0])
            raise SpecError(
                f"{norm.path}: the running variance of channel {channel} is {float(variance[channel]):g} and eps is {norm.eps:g}, "
                "so its normalization divides by zero; train with eps > 0, or mend the checkpoint"
            )
        if silent := tuple((variance == 0).nonzero().flatten().tolist()):
            self.silent[norm.path] = silent
        gain = self._vector(f"{norm.path}.weight", 1.0) / spread.sqrt()
        return gain, self._vector(f"{norm.path}.bias", 0.0) - self.reader[f"{norm.path}.running_mean"].double() * gain


def _branch_name(path: str, module: str) -> str:
    """What reports call a branch: the path inside the block, without what the convolution or batch norm itself is called in its pair."""
    own = path.removeprefix(f"{module}.") if module else path
    return own.rpartition(".")[0] or own


# models ----------------------------------------------------------------------------------------------------------------------------------


def fuse_structure(model: nn.Module) -> tuple[nn.Module, tuple[Branches, ...]]:
    """Put one convolution in the place of every block's branches, in `model` itself; its values are nobody's yet.

    Where there are blocks of branches, convolutions with a batch norm alone are folded too, so that nothing is left to fold in such a network; a
    model without branches stays as it is (qcore's transform `fold-batchnorm` is for those).

    return: `model`, or what takes its place where the branches are summed in its own forward; and what was fused
    """
    require_eval(model)
    claimed: set[int] = set()
    done: list[Branches] = []
    for pairs in (False, True):
        if pairs and not done:
            break
        for path, module in innermost_first(model):
            found = [] if id(module) in claimed else traced_branches(path, module, claimed, pairs)
            if not found:
                continue
            fused = _without_branches(path, module, found)
            claimed.add(id(fused))
            done += [f.branches for f in found]
            if path:
                model.set_submodule(path, fused)
            else:
                model = fused
    return model, tuple(done)


def _without_branches(path: str, module: nn.Module, found: Sequence[Found]) -> nn.Module:
    """The traced forward of `module` with a convolution for each of its blocks of branches."""
    graph = found[0].graph
    new: dict[str, nn.Module] = {}
    now: dict[fx.Node, fx.Node] = {}  # what a block reads may be another block that was replaced already
    for f in found:
        own = f.branches.name.rpartition(".")[2]
        new[own] = _conv(f.branches.geometry, module)
        with graph.inserting_after(f.end):
            node = now[f.end] = graph.call_module(own, (now.get(f.base, f.base),))
        f.end.replace_all_uses_with(node)
        for gone in reversed([n for n in graph.nodes if n in set(f.inside)]):
            graph.erase_node(gone)
    kept: dict[str, nn.Module | Tensor] = dict(new)
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target not in new:
            kept[target] = module.get_submodule(target)
        elif node.op == "get_attr":
            owner, _, own = target.rpartition(".")
            kept[target] = getattr(module.get_submodule(owner), own)
    return fx.GraphModule(kept, graph, class_name=f"Fused{type(module).__name__}").eval()


def _conv(g: Geometry, module: nn.Module) -> nn.Module:
    like = next(module.parameters())
    with torch.device("meta"):
        conv = nn.Conv2d(g.in_channels, g.out_channels, g.kernel, g.stride, g.padding, g.dilation, g.groups, bias=True, dtype=like.dtype)
    return conv.requires_grad_(False)


class FusedReader:
    """The tensors of a model whose branches are fused, computed in float64 from those of the model with branches, in their dtype."""

    def __init__(self, reader: TensorReader, fused: Sequence[Branches]) -> None:
        self._reader = reader
        self._made = {f"{b.name}.{own}": (b, own) for b in fused for own in ("weight", "bias")}
        self._gone = tuple(f"{path}." for b in fused for path in b.paths)

    def names(self) -> Iterable[str]:
        return [*(n for n in self._reader.names() if not n.startswith(self._gone)), *self._made]

    def __contains__(self, name: object) -> bool:
        return name in self._made or (isinstance(name, str) and name in self._reader and not name.startswith(self._gone))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            if name.startswith(self._gone):
                raise NotFound(f"{name!r} was fused into one convolution with its fellow branches")
            return self._reader[name]
        branches, own = self._made[name]
        folded = fold(branches, self._reader)
        value = folded.kernel if own == "weight" else folded.bias
        dtype = self._reader[f"{next(c.path for c in leaves(branches.sum) if isinstance(c, Conv))}.weight"].dtype
        if not bool(torch.isfinite(value).all()):
            raise SpecError(f"{name}: fusing the branches gives NaN or infinity; a weight or a running statistic of {branches.module} is not finite")
        return value.to(dtype)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` with one convolution for each block of branches: the same function, in float64 up to the order of sums.

    SpecError where it is in training mode, or a batch norm would divide by zero.
    """
    require_eval(model)
    reader = DictReader({name: t.detach() for name, t in model.state_dict().items()})
    twin, fused = fuse_structure(copy.deepcopy(model))
    values = FusedReader(reader, fused)
    for b in fused:
        conv = twin.get_submodule(b.name)
        for own in ("weight", "bias"):
            conv._parameters[own] = nn.Parameter(values[f"{b.name}.{own}"], requires_grad=False)
    return twin


def require_fused(model: nn.Module) -> None:
    """SpecError where a model that is called deployed still has branches."""
    if found := find_branches(model):
        first = found[0]
        own = [_branch_name(leaf.path, first.module) if isinstance(leaf, Conv) else "x itself" for leaf in leaves(first.sum)]
        what = ", ".join(own)
        raise SpecError(
            f"{len(found)} blocks have branches that are not fused, {first.module or 'the model itself'} first ({what}); their sum, not "
            "each of them, is what is deployed and quantized: qplug_reparam.fuse.fuse(model), or load the model by its source, which fuses them"
        )
