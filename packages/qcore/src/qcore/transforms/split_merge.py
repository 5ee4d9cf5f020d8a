"""QLLM: take apart the channels whose activations are large, and put alike ones together in exchange.

A channel j with the largest magnitude M_j becomes t_j = ⌈M_j/θ⌉ channels x_j/t_j, each read by a copy of its weights: exact.  So that the layer keeps
its width, as many pairs of ordinary channels (i, j) become one, (x_i + x_j)/2, read by W_i + W_j: what is lost is (x_i - x_j)/2 · (W_i - W_j), whose
size is known without forming outputs.

    x   = [ 40, 1, 1.1, -2 ],  θ = 20   →   t = [ 2, 1, 1, 1 ],  copies 20, 20;  channels 1 and 2 become 1.05   →   [ 20, 20, 1.05, -2 ]

A smaller θ is not always better: the copies of a channel are rounded alike, so their errors add up, and ordinary channels are lost.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import AbsMax
from qcore.calibration.sample import Sample
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Port, Site, Topology
from qcore.modules.reassemble import ReassembleChannels
from qcore.numbers import QuantSpec, fake_quantize
from qcore.transforms.base import Transform
from qcore.transforms.channels import seen_at, site_of
from qcore.transforms.rewrite import Insert, ModuleConfig, Put, Rewrite


@dataclass(frozen=True)
class Assembly:
    """New channels from old ones, as `ReassembleChannels` makes them.  pairs: [2, C'];  copies: [C']"""

    pairs: Tensor
    copies: Tensor

    def inputs(self, x: Tensor) -> Tensor:
        """What the module makes of x.  [T, C] → [T, C']"""
        return (x[:, self.pairs[0]] + x[:, self.pairs[1]]) / (2 * self.copies).to(x)

    def weight(self, w: Tensor) -> Tensor:
        """The columns that read it: W_j for every copy of j, W_i + W_j for a pair.  [N, C] → [N, C']"""
        a, b = self.pairs
        return torch.where(a == b, w[:, a], w[:, a] + w[:, b])


def copies_of(magnitude: Tensor, theta: float) -> Tensor:
    """t_j = ⌈M_j/θ⌉, 1 where nothing is too large.  [C] int64"""
    if not theta > 0:
        raise SpecError(f"channels are taken apart down to a positive θ, got {theta}")
    return (magnitude.double() / theta).ceil().long().clamp(min=1)


def merge_errors(x: Tensor, w: Tensor) -> Tensor:
    """D(i, j) = ‖x_i - x_j‖²·‖W_i - W_j‖²/4: the squared error of all outputs, summed over rows, when i and j become one.

    x: [T, C];  w: [N, C]
    return: [⌈C/2⌉, ⌊C/2⌋] float64, of every even channel with every odd one
    """
    return _distances(x.double()) * _distances(w.double()) / 4


def _distances(columns: Tensor) -> Tensor:
    even, odd = columns[:, ::2], columns[:, 1::2]
    return (even.square().sum(0).unsqueeze(1) + odd.square().sum(0) - 2 * even.mT @ odd).clamp(min=0)


def candidates(errors: Tensor) -> Tensor:
    """Every pair of an even and an odd channel, the cheapest first.  errors: as `merge_errors` gives them;  return: [2, pairs] int64"""
    order = errors.flatten().argsort(stable=True)
    return torch.stack([order // errors.shape[1] * 2, order % errors.shape[1] * 2 + 1])


def assemble(copies: Tensor, order: Tensor | None) -> Assembly | None:
    """The channels taken apart, and as many pairs put together as there are channels too many.  None where there are not enough ordinary channels.

    copies: [C] t of each channel
    order:  [2, pairs], the cheapest first (`candidates`); each channel is in one pair at most, and in none if it was taken apart.  None = nothing is
            put together, and the layer grows
    """
    size = copies.shape[0]
    partner = torch.arange(size)
    gone = torch.zeros(size, dtype=torch.bool)
    if order is not None:
        left, used = int(copies.sum()) - size, (copies > 1).tolist()
        for i, j in (pair for some in order.split(4096, dim=1) for pair in some.T.tolist()):
            if not left:
                break
            if not (used[i] or used[j]):
                used[i] = used[j] = True
                partner[i], gone[j], left = j, True, left - 1
        if left:
            return None
    kept = torch.arange(size)[~gone].repeat_interleave(copies[~gone])
    return Assembly(torch.stack([kept, partner[kept]]), copies[kept])


@dataclass(frozen=True)
class SplitMerge(Transform):
    """Channel disassembly and assembly, for inputs that are rounded.  Put it last: behind what it inserts there are no links.

    Where: the inputs of linear layers that read whole channels of a link without heads: behind the norms, and before down_proj.  All layers that read
    one norm get the same channels; each gathers them for itself at run time.

    θ is the best of `steps`, from the largest magnitude downwards, as long as at most ratio·C channels are added: the one whose rounded inputs and
    rounded weights bring the outputs of all layers that read them nearest to the float ones, on sampled rows.  Nothing is done where that is best.

    Source: https://arxiv.org/abs/2310.08041 (QLLM), sections 4.1 and 4.2.  Differs: θ is judged by the outputs of the layers that read the channels,
    not of the attention or feed-forward part behind them; pairs are disjoint.  Price: a run holds the float weights that it changed.

    ratio:    extra channels, as a fraction of all
    steps:    values of θ that are tried, evenly spaced
    assemble: False = no channel is lost and the layers grow, exactly
    rows:     inputs on which θ is judged
    links:    a shell pattern over link names
    """

    name: ClassVar[str] = "split-merge"
    ratio: float = 0.2
    steps: int = 100
    assemble: bool = True
    rows: int = 128
    links: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 0.5:
            raise SpecError(f"at most half of the channels are added, got ratio={self.ratio}; take one in (0, 0.5]")
        if self.steps < 1 or self.rows < 1:
            raise SpecError(f"θ is chosen among at least one step on at least one row, got steps={self.steps}, rows={self.rows}")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return not self.assemble

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {ports[0].input: (AbsMax(), Sample(rows=self.rows)) for ports in self._groups(topology, specs).values()}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for name, sites in self._groups(topology, specs).items():
            watched = sites[0].input
            sites = [s for s in sites if isinstance(model.get_submodule(s.module), nn.Linear)]
            if not sites:
                continue
            magnitude, x = (seen_at(watched, observer, seen) for observer in (AbsMax.name, Sample.name))
            weights = {site: reader[site.param] for site in sites}
            wide = {site: w if w.dtype is torch.float64 else w.float() for site, w in weights.items()}
            best, before, after, theta = self.search(magnitude, x, wide, specs)
            if best is None:
                rewrite = rewrite.then(Rewrite(notes=(f"{name}: no θ rounds better than channels as they are",)))
                continue
            config = {"size": x.shape[-1], "width": best.copies.shape[0]}
            tensors = {"pairs": best.pairs, "copies": best.copies}
            split = best.pairs[0][best.copies > 1]
            note = f"{name}: {len(split)} channels stand for {len(split.unique())} (θ = {theta:.4g}), which leaves {after / before:.1%} of the error"
            rewrite = rewrite.then(
                Rewrite(
                    edits={site.param: (Put(Port(site.param, "in"), best.weight(w)),) for site, w in wide.items()},
                    inserts={site.module: Insert(ModuleConfig(ReassembleChannels.name, config, tensors)) for site in sites},
                    exact=_deviation(best, x, wide.values()) if self.assemble else 0.0,
                    notes=(note,),
                )
            )
        return replace(rewrite, exact=max(rewrite.exact, 1e-9)) if self.assemble else rewrite

    def search(
        self, magnitude: Tensor, x: Tensor, weights: Mapping[Site, Tensor], specs: Mapping[Site, QuantSpec]
    ) -> tuple[Assembly | None, float, float, float]:
        """The best assembly or None, the squared error of the outputs without any and with it, and its θ.

        magnitude: [C] M;  x: [T, C] sampled inputs;  weights: [N, C] of each layer that reads them
        """
        size, top = magnitude.shape[0], float(magnitude.max())
        x = x.to(next(iter(weights.values())).dtype)
        before = best_error = self._error(Assembly(torch.arange(size).expand(2, -1), torch.ones(size, dtype=torch.long)), x, weights, specs)
        best, best_theta, tried = None, top, size
        order = candidates(merge_errors(x, torch.cat(list(weights.values())))) if self.assemble else None
        for step in range(1, self.steps) if top > 0 else ():
            theta = top * (1 - step / self.steps)
            copies = copies_of(magnitude, theta)
            count = int(copies.sum())
            if count - size > self.ratio * size:
                break
            # copies only grow as θ falls: the same number of them is the same choice
            if count == tried:
                continue
            tried, found = count, assemble(copies, order)
            if found is not None and (error := self._error(found, x, weights, specs)) < best_error:
                best, best_error, best_theta = found, error, theta
        return best, before, best_error, best_theta

    def _error(self, own: Assembly, x: Tensor, weights: Mapping[Site, Tensor], specs: Mapping[Site, QuantSpec]) -> float:
        total = 0.0
        for site, w in weights.items():
            rounded = fake_quantize(own.inputs(x), specs[site.input]) @ fake_quantize(own.weight(w), specs[site]).mT
            total += float((rounded - x @ w.mT).double().square().sum())
        return total

    def _groups(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> dict[str, list[Site]]:
        """Weights with rounded inputs that read the same channels, by link."""
        groups: dict[str, list[Site]] = {}
        for link in topology.links_with(Invariance.SCALE):
            whole = [p for p in link.reads if p.axis == "in" and p.part is None and not p.channels and p.repeat == 1]
            sites = [s for s in map(site_of, whole) if s.tensor == "weight" and s in specs and s.input in specs]
            if link.heads == 1 and sites and fnmatchcase(link.name, self.links):
                groups[link.name] = sites
        return groups


def _deviation(own: Assembly, x: Tensor, weights: Iterable[Tensor]) -> float:
    """The largest relative deviation of the outputs of the layers that read the channels, on the sampled rows."""
    worst = 0.0
    for w in weights:
        y = x.to(w) @ w.mT
        worst = max(worst, float((own.inputs(x.to(w)) @ own.weight(w).mT - y).abs().max() / y.abs().max().clamp(min=1e-30)))
    return worst
