"""Hadamard rotations: spread outliers over all channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from torch import nn

from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Port, Site, Topology
from qcore.numbers import QuantSpec
from qcore.numbers.hadamard import core_size, padded_size, random_signs
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Hadamard, Insert, ModuleConfig, Rewrite, cut_ties, hadamard_link


@dataclass(frozen=True)
class HadamardRotate(Transform):
    """Rotate the residual stream and the heads' values by random-sign Hadamard matrices, merged into the weights.

    Put FoldNorm before it: a norm with a gain does not commute with a rotation.  Families whose topology allows no rotation of the residual stream
    (LayerNorm's mean, a gained norm before the residual add) are refused, unless something else is left to rotate.

    residual:  rotate links that pass norms
    inner:     rotate the other links that allow it, head by head: value → output
    online:    shell patterns over weight sites ("*.down_proj:weight"): their input is rotated at run time, by a module before the leaf
    odd_sizes: for sizes without a Hadamard matrix: "block": block-diagonal, of the largest divisor that has one; "refuse": an error.
               Online rotations pad with zeros instead; the weight grows with them
    seed:      of the signs

    Source: https://arxiv.org/abs/2404.00456 (QuaRot), stages 1b to 1d.
    """

    name: ClassVar[str] = "hadamard"
    scope: ClassVar[Literal["block", "model"]] = "model"
    residual: bool = True
    inner: bool = True
    online: tuple[str, ...] = ()
    odd_sizes: Literal["block", "refuse"] = "block"
    seed: int = 0

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite, notes = Rewrite(), []
        for i, link in enumerate(topology.links_with(Invariance.ROTATE)):
            if not (self.residual if link.through else self.inner):
                continue
            require_folded(link, topology, model, reader)
            size = link.size // link.heads
            block = largest_block(size)
            if block < size and self.odd_sizes == "refuse":
                raise SpecError(
                    f"link {link.name!r}: no Hadamard matrix of size {size} is known; use odd_sizes='block' (blocks of {block}) or leave it out"
                )
            if block < size:
                notes.append(f"link {link.name}: no Hadamard matrix of size {size} is known, rotated in blocks of {block}")
            rewrite = rewrite.then(hadamard_link(link, random_signs(link.size, self.seed + i), block))
        if self.residual and not any(link.through for link in topology.links_with(Invariance.ROTATE)):
            notes.append("the residual stream is not rotated: no link of this family allows it")
        for i, site in enumerate(self._online_sites(topology)):
            rewrite = rewrite.then(online_rotation(site, model, self.seed + 7919 * (i + 1)))
        if rewrite.empty:
            raise SpecError(
                "there is nothing to rotate: no link of this topology allows ROTATE, and `online` matches no site; leave HadamardRotate out"
            )
        return cut_ties(Rewrite(**{**rewrite.__dict__, "notes": tuple(notes)}), model, topology.ties)

    def _online_sites(self, topology: Topology) -> list[Site]:
        sites = []
        for pattern in self.online:
            matched = [s for s in topology.sites if fnmatchcase(str(s), pattern) and s not in sites]
            if not matched:
                raise SpecError(f"online={pattern!r} matches no weight site; there is, for instance, {topology.sites[0]}")
            sites += matched
        return sites


def largest_block(size: int) -> int:
    """The largest divisor of `size` for which a Hadamard matrix is known."""
    return next(d for d in range(size, 0, -1) if size % d == 0 and core_size(d) is not None)


def require_folded(link: Link, topology: Topology, model: nn.Module, reader: TensorReader) -> None:
    """SpecError unless every norm that the link passes commutes with a rotation: one gain for all channels, no bias."""
    gains = {port.param: port.gain for other in topology.links for port in other.ports}
    for path in link.through:
        for name, _ in model.get_submodule(path).named_parameters(recurse=False):
            value = reader[f"{path}.{name}"].double()
            if name == "bias" and bool((value != 0).any()):
                raise SpecError(f"link {link.name!r} passes {path}, whose bias is not zero: it cannot be rotated; put FoldNorm() before")
            if name != "bias" and bool((value != value.flatten()[0]).any()):
                gain = value + gains.get(f"{path}.{name}", 0.0)
                spread = f"{float(gain.min()):.3g} … {float(gain.max()):.3g}"
                raise SpecError(
                    f"link {link.name!r} passes {path}, whose gains differ ({spread}): a rotation needs them folded; put FoldNorm() before"
                )


def online_rotation(site: Site, model: nn.Module, seed: int) -> Rewrite:
    """A Hadamard rotation of the leaf's input at run time, and its inverse in the leaf's weight.

    A size without a Hadamard matrix is padded with zeros: activations by the module, the weight's new columns likewise.
    """
    module = model.get_submodule(site.module)
    if (not isinstance(module, nn.Linear) and layout(module, site.tensor).parts != 1) or hasattr(module, "kernel_size"):
        raise SpecError(f"{site}: only the input of a linear layer is rotated at run time, this is a {type(module).__name__}")
    size = module.in_features if isinstance(module, nn.Linear) else layout(module, site.tensor).matrix(getattr(module, site.tensor)).shape[1]
    padded = padded_size(size)
    if padded != size and not isinstance(module, nn.Linear):
        raise SpecError(f"{site}: {size} inputs must be padded to {padded}, which only nn.Linear is taught")
    signs = random_signs(padded, seed)
    return Rewrite(
        edits={site.param: (Hadamard(Port(site.param, "in"), signs, padded),)},
        inserts={site.module: Insert(ModuleConfig("hadamard", {"size": size, "padded": padded}, {"signs": signs.float()}))},
    )
