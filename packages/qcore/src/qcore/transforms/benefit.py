"""Is a rewrite worth it?  The predicted error of the weights it touches, with and without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import Gram
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec, fake_quantize
from qcore.transforms.base import Transform
from qcore.transforms.channels import seen_at, site_matrix
from qcore.transforms.rewrite import Put, Rewrite, owner_of


def gram_error(delta: Tensor, gram: Tensor) -> float:
    """tr(ΔW G ΔWᵀ): the squared error of the outputs, summed over them, that an error ΔW of the weight causes.

    delta: [N, K];  gram: [K, K], or [P, K, K] where each N/P rows see inputs of their own
    """
    d = delta.double().unflatten(0, (gram.shape[0] if gram.ndim == 3 else 1, -1))
    return float((d @ gram.double() * d).sum())


@dataclass(frozen=True)
class Benefit:
    """before, after: predicted squared output error by weight site, without and with the rewrite."""

    before: Mapping[Site, float]
    after: Mapping[Site, float]

    @property
    def reduction(self) -> float:
        """1 - after/before over all sites: 0.25 = a quarter of the error is gone; negative = it grows; 0 where nothing was touched."""
        total = sum(self.before.values())
        return 1 - sum(self.after.values()) / total if total else 0.0


def touched_sites(rewrite: Rewrite, specs: Mapping[Site, QuantSpec]) -> tuple[Site, ...]:
    """Weights that are to be quantized, and that the rewrite changes so that there is a way back."""
    return tuple(s for s in specs if (edits := rewrite.edits.get(s.param)) and not any(isinstance(e, Put) for e in edits))


def benefit(rewrite: Rewrite, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Benefit:
    """Round each touched weight to its spec as it is, and as rewritten; compare in the original model's inputs and outputs.

    The rounded rewritten weight is taken back through the inverse of its edits, which is the same as carrying the Gram matrix forward.
    It predicts rounding to nearest of weights alone: a transform for activations (SmoothQuant) usually looks bad here, and split leaves are left out.

    seen: must hold "gram" at the input of every touched weight (`touched_sites`)
    """
    before, after = {}, {}
    for site in touched_sites(rewrite, specs):
        w, owner = reader[rewrite.source(site.param)], owner_of(model, site.param)
        gram = seen_at(site.input, Gram.name, seen)
        plain = site_matrix(site, w, owner).float()
        before[site] = gram_error(fake_quantize(plain, specs[site]) - plain, gram)
        rewritten = rewrite.tensor(site.param, w, owner)
        rounded = _rounded(site, specs[site], rewritten, owner)
        back = rewrite.undo(site.param, rounded, owner)
        back = back[tuple(slice(0, n) for n in w.shape)]  # an axis that a padded Hadamard let grow
        after[site] = gram_error(site_matrix(site, back - w.double(), owner), gram)
    return Benefit(before, after)


def _rounded(site: Site, spec: QuantSpec, w: Tensor, owner: nn.Module) -> Tensor:
    """The parameter with the site's part of it on the grid."""
    lay = layout(owner, site.tensor)
    matrix = lay.matrix(w).clone()
    rows = torch.arange(matrix.shape[0])
    if site.part is not None:
        rows = rows.unflatten(0, (w.shape[0], -1))[site.part]
    if site.channels:
        rows = torch.cat([rows[r.start : r.stop] for r in site.channels])
    matrix[rows] = fake_quantize(matrix[rows].float(), spec).to(matrix)
    return lay.tensor(matrix, w.shape)


@dataclass(frozen=True)
class IfBeneficial(Transform):
    """Fit a transform, and keep its rewrite only if the predicted error of the weights falls.

    transform: the one to try
    least:     the smallest relative reduction (`Benefit.reduction`) that is worth it
    """

    name: ClassVar[str] = "if-beneficial"
    transform: Transform
    least: float = 0.0

    @property
    def scope(self) -> Literal["block", "model"]:  # type: ignore[override]
        return self.transform.scope

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.transform.exact

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        wishes = {site: tuple(observers) for site, observers in self.transform.wants(topology, specs).items()}
        params = {port.param for link in topology.links for port in link.ports}
        for site in specs:
            if site.param in params and not any(isinstance(o, Gram) for o in wishes.get(site.input, ())):
                wishes[site.input] = (*wishes.get(site.input, ()), Gram())
        return wishes

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = self.transform.fit(topology, specs, seen, model, reader)
        reduction = benefit(rewrite, specs, seen, model, reader).reduction
        if reduction > self.least:
            return rewrite
        note = f"{self.transform.name}: left out; the weights' predicted error changes by {-reduction:+.1%}, wanted: less than {-self.least:+.1%}"
        return Rewrite(notes=(*rewrite.notes, note))
