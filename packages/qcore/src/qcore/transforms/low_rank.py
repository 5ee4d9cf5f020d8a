"""A low-rank correction: a product of two thin matrices beside the weight makes good what rounding loses."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import Gram
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Port, Site, Topology
from qcore.modules.leaves import leaf_config
from qcore.numbers import QuantSpec, quantize, scale_parts
from qcore.numbers.granularity import block_range, to_blocks
from qcore.transforms.base import Transform
from qcore.transforms.channels import seen_at
from qcore.transforms.rewrite import Put, Rewrite, Shift
from qcore.transforms.split import Part, split_leaf


@dataclass(frozen=True)
class LowRank(Transform):
    """Split each weight into W - L, stored as its rule says, and L = U·V of low rank, stored as rules for "*.fine.*:weight" say.

    L is fitted by turns, as LoftQ does: L = the best rank-r part of W - Q(W - L), Q rounding to nearest with searched ranges; and the best of the
    rounds is kept.  "Best" counts what the inputs make of an error, tr(E G Eᵀ), as LQER does with its scales, but with all of G.  Sums of leaves
    have no links any more: put this transform last.

    Sources: LQER https://arxiv.org/abs/2402.02446; LoftQ https://arxiv.org/abs/2310.08659; LoRC https://arxiv.org/abs/2303.08302.
    Rounding errors are nearly white, so little of them is of low rank; the notes of a run say how much is left, docs/evidence/solvers.md what that
    is worth.

    sites:  shell patterns over weight sites
    rank:   r
    rounds: of fitting
    damp:   added to the Gram's diagonal, as a fraction of its mean
    """

    name: ClassVar[str] = "low-rank"
    parts: ClassVar[tuple[str, ...]] = ("coarse", "fine.0", "fine.1")
    sites: tuple[str, ...] = ("*:weight",)
    rank: int = 8
    rounds: int = 4
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.rank < 1 or self.rounds < 1:
            raise SpecError(f"a correction has a rank and rounds of at least 1, got rank={self.rank}, rounds={self.rounds}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {s.input: (Gram(),) for s in self._matched(topology, specs)}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for site in self._matched(topology, specs):
            module, tensor = model.get_submodule(site.module), reader[site.param]
            own = layout(module, site.tensor)
            w = own.matrix(tensor).double()
            if self.rank >= min(w.shape):
                raise SpecError(f"{site}: a correction of rank {self.rank} is no smaller than the weight {tuple(w.shape)}; take a lower rank")
            up, down, left = self.factors(w, specs[site], seen_at(site.input, Gram.name, seen))
            found = _split(site.module, module, up, down, own.tensor(up @ down, tensor.shape))
            note = f"{site}: rank {self.rank} leaves {left:.0%} of the error of nearest rounding"
            rewrite = rewrite.then(found).then(Rewrite(notes=(note,)))
        return rewrite

    def factors(self, w: Tensor, spec: QuantSpec, gram: Tensor) -> tuple[Tensor, Tensor, float]:
        """U [N, r], V [r, K], and the share of the error that is left when W - UV is rounded to nearest.  w: [N, K] float64"""
        h = gram.double().clone()
        h.diagonal().add_(max(self.damp * float(h.diagonal().mean()), 1e-30))
        root = torch.linalg.cholesky(h)
        best = first = _loss(w - nearest(w, spec), root)
        up, down = w.new_zeros(w.shape[0], self.rank), w.new_zeros(self.rank, w.shape[1])
        correction = torch.zeros_like(w)
        for _ in range(self.rounds):
            u, s, v = torch.linalg.svd((w - nearest(w - correction, spec)) @ root, full_matrices=False)
            half = s[: self.rank].sqrt()
            left, right = u[:, : self.rank] * half, torch.linalg.solve_triangular(root, half.unsqueeze(1) * v[: self.rank], upper=False, left=False)
            correction = left @ right
            rest = w - correction
            now = _loss(rest - nearest(rest, spec), root)
            if now < best:
                best, up, down = now, left, right
        return up, down, best / max(first, 1e-300)

    def _matched(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> list[Site]:
        """Quantized weights of layers that two thin ones can stand beside: no grouped convolutions, no slices, no stacks."""
        sites = [s for s in topology.sites if s in specs and s.tensor == "weight" and s.part is None and not s.channels]
        return [s for s in sites if any(fnmatchcase(str(s), p) for p in self.sites)]


def nearest(w: Tensor, spec: QuantSpec) -> Tensor:
    """w on the spec's grid, each block within the one of a few shrunk ranges that loses least.  [N, K]"""
    if not spec.scaled or spec.format.parts:
        return quantize(w, spec).dequantize().to(w)
    block = spec.granularity.block(tuple(w.shape))
    low, high = block_range(w, block)
    best: tuple[Tensor, Tensor] | None = None
    for factor in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        share = torch.full_like(low, factor)
        error = to_blocks((w - _within(w, spec, low * share, high * share)).square(), block).sum(-1)
        best = (error, share) if best is None else (torch.minimum(error, best[0]), torch.where(error < best[0], share, best[1]))
    assert best is not None
    return _within(w, spec, low * best[1], high * best[1])


def _within(w: Tensor, spec: QuantSpec, low: Tensor, high: Tensor) -> Tensor:
    return quantize(w, spec, scale_parts(low, high, spec)).dequantize().to(w)


def _loss(error: Tensor, root: Tensor) -> float:
    return float((error @ root).square().sum())


def _split(path: str, module: nn.Module, up: Tensor, down: Tensor, whole: Tensor) -> Rewrite:
    """coarse = W - UV with the bias; fine = V, then U.  whole: UV in the weight's shape"""
    leaf, own, rank = leaf_config(module), Port("", "out"), up.shape[1]
    thin: dict[str, Any]
    wide: dict[str, Any]
    if isinstance(module, nn.Linear):
        thin, wide = {**leaf, "out_features": rank, "bias": False}, {**leaf, "in_features": rank, "bias": False}
    else:
        if leaf.get("groups") != 1:
            raise SpecError(f"{path}: a correction of low rank needs a linear layer or a convolution of one group; leave it out of `sites`")
        ones = [1] * len(leaf["kernel_size"])
        thin = {**leaf, "out_channels": rank, "bias": False}
        wide = {**leaf, "in_channels": rank, "kernel_size": ones, "stride": ones, "dilation": ones, "padding": [0] * len(ones), "bias": False}
        down, up = down.reshape(rank, *whole.shape[1:]), up.reshape(*up.shape, *ones)
    return split_leaf(
        path,
        module,
        Part(leaf, {"weight": (Shift(own, -whole),)}, bias=leaf["bias"]),
        Part({"type": "sequential", "children": [thin, wide]}, {"0.weight": (Put(own, down),), "1.weight": (Put(own, up),)}),
    )
