"""KLT-enhanced rotation: afterwards every channel has the same variance.

With Cov = K Λ Kᵀ the covariance of channels, x K has the variances Λ, and x K H, for H orthogonal with entries ±1/√m, has the mean of Λ on every
channel.  The other orientation, x (K H)ᵀ, keeps the function just as well and equalizes nothing.
Source: https://arxiv.org/abs/2501.13484, section 4.2.  The released code has that other orientation at the Δ projection, takes the covariance
from one batch and, for the residual stream, from the first layer alone; and it multiplies rotations of layers onto each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Site, Topology
from qcore.numbers import QuantSpec
from qcore.numbers.hadamard import core_size, hadamard
from qcore.transforms.base import Transform
from qcore.transforms.channels import seen_at
from qcore.transforms.rewrite import Rewrite, cut_ties, rotate_link
from qcore.transforms.rotate import require_folded
from torch import Tensor, nn

from qplug_ssm.covariance import Covariance


@dataclass(frozen=True)
class KLTRotate(Transform):
    """Rotate links by K·H, from the covariance of what reads them, over all batches and all readers.

    Put FoldNorm before it where the residual stream is rotated.

    links:     a shell pattern over link names: "residual", "*.delta"
    odd_sizes: for sizes without a Hadamard matrix: "givens": m - 1 plane rotations that make the variances equal all the same, but mix channels less;
               "refuse": an error
    """

    name: ClassVar[str] = "klt"
    scope: ClassVar[Literal["block", "model"]] = "model"
    links: str = "*"
    odd_sizes: Literal["givens", "refuse"] = "givens"

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {site: (Covariance(),) for link in self._links(topology) for site in readers_of(link, topology)}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite, notes = Rewrite(), []
        for link in self._links(topology):
            require_folded(link, topology, model, reader)
            covariance = torch.stack([seen_at(site, Covariance.name, seen) for site in readers_of(link, topology)]).mean(0)
            if core_size(link.size) is None:
                if self.odd_sizes == "refuse":
                    raise SpecError(f"link {link.name!r}: no Hadamard matrix of size {link.size} is known; use odd_sizes='givens', or leave it out")
                notes.append(f"link {link.name}: no Hadamard matrix of size {link.size} is known; variances are equalized by plane rotations")
            rewrite = rewrite.then(rotate_link(link, equalizing_rotation(covariance).unsqueeze(0)))
        if rewrite.empty:
            raise SpecError(f"klt: no link that may be rotated matches {self.links!r}; leave the transform out")
        return cut_ties(Rewrite(**{**rewrite.__dict__, "notes": tuple(notes)}), model, topology.ties)

    def _links(self, topology: Topology) -> list[Link]:
        found = [link for link in topology.links_with(Invariance.ROTATE) if fnmatchcase(link.name, self.links)]
        return [link for link in found if link.heads == 1 and readers_of(link, topology)]


def readers_of(link: Link, topology: Topology) -> list[Site]:
    """Where the link's channels can be seen: the inputs of the sites that read them."""
    sites = {site.param: site for site in topology.sites}
    return [sites[p.param].input for p in link.reads if p.axis == "in" and p.part is None and p.param in sites]


def equalizing_rotation(covariance: Tensor) -> Tensor:
    """An orthogonal R for which Rᵀ Cov R has one number all along its diagonal.  [m, m] float64"""
    variances, K = torch.linalg.eigh(covariance.double())
    m = len(variances)
    return K @ (hadamard(m) if core_size(m) is not None else levelling(variances))


def levelling(variances: Tensor) -> Tensor:
    """A product of m - 1 plane rotations after which diag(variances) has its mean all along the diagonal (Schur and Horn: there always is one).

    Each rotation takes the largest and the smallest entry and puts the mean in the place of one of them.
    """
    m = len(variances)
    a, R, mean = torch.diag(variances.double()), torch.eye(m, dtype=torch.float64), variances.double().mean()
    free = list(range(m))
    for _ in range(m - 1):
        diagonal = a.diagonal()
        high, low = max(free, key=lambda i: float(diagonal[i])), min(free, key=lambda i: float(diagonal[i]))
        if high == low or float(diagonal[high] - diagonal[low]) <= 1e-15 * float(mean.abs()):
            break
        # a' = c² a_hh - 2cs a_hl + s² a_ll = mean, solved for t = s / c
        b, over, under = a[high, low], a[high, high] - mean, a[low, low] - mean
        t = (b + (b.square() - over * under).clamp(min=0).sqrt()) / under if float(under.abs()) > 0 else torch.zeros(())
        c = 1 / (1 + t.square()).sqrt()
        g = torch.eye(m, dtype=torch.float64)
        g[high, high] = g[low, low] = c
        g[high, low], g[low, high] = c * t, -c * t
        a, R = g.T @ a @ g, R @ g
        free.remove(high)
    return R
