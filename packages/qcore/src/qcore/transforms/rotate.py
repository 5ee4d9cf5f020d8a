"""Hadamard rotations: spread outliers over all channels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from torch import nn

from qcore.calibration.observer import Observer, Seen
from qcore.calibration.sample import Sample
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Port, Site, Topology
from qcore.modules.hadamard import HeadHadamard
from qcore.numbers import QuantSpec, fake_quantize
from qcore.numbers.hadamard import core_size, padded_size, random_signs
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Hadamard, Insert, ModuleConfig, Rewrite, cut_ties, hadamard_link
from qcore.transforms.rotation_choice import choice_wants, relative, rotation_errors


@dataclass(frozen=True)
class HadamardRotate(Transform):
    """Rotate the residual stream and the heads' values by random-sign Hadamard matrices, merged into the weights.

    Put FoldNorm before it: a norm with a gain does not commute with a rotation.  Families whose topology allows no rotation of the residual stream
    (LayerNorm's mean, a gained norm before the residual add) are refused, unless something else is left to rotate.

    residual:  rotate links that pass norms
    inner:     rotate the other links that allow it, head by head: value → output
    online:    shell patterns over weight sites ("*.down_proj:weight"): their input is rotated at run time, by a module before the leaf
    rest:      rotate at run time too the inputs that will be rounded and that no link rotates: down_proj's, behind a SiLU
    heads:     rotate queries and keys at run time, after the rotary embedding, where keys will be rounded
    choose:    rotate only where the measured error of what is rounded falls (see `rotation_choice`); False = everywhere, as QuaRot does
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
    rest: bool = False
    heads: bool = False
    choose: bool = False
    odd_sizes: Literal["block", "refuse"] = "block"
    seed: int = 0

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return choice_wants(topology, specs) if self.choose else {}

    def foresee(self, topology: Topology, specs: Mapping[Site, QuantSpec], model: nn.Module) -> list[str]:
        """What can be said before anything is fitted: what will not be rotated, and what stands in its place."""
        return foreseen(self, topology, specs, model)

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite, notes = Rewrite(), foreseen(self, topology, specs, model)
        for i, link in rotated_links(self, topology):
            require_folded(link, topology, model, reader)
            found = hadamard_link(link, random_signs(link.size, self.seed + i), self.block_of(link))
            if self.is_worth_it(found, f"link {link.name}", specs, seen, model, reader, topology, notes):
                rewrite = rewrite.then(found)
        at_run_time = self.at_run_time(topology, specs, seen, model, reader, notes)
        if rewrite.empty and at_run_time.empty and not self.choose:
            raise SpecError(
                "there is nothing to rotate: no link of this topology allows ROTATE, and `online` matches no site; leave HadamardRotate out"
            )
        return cut_ties(replace(rewrite.then(at_run_time), notes=tuple(notes)), model, topology.ties)

    def at_run_time(
        self,
        topology: Topology,
        specs: Mapping[Site, QuantSpec],
        seen: Mapping[Site, Seen],
        model: nn.Module,
        reader: TensorReader,
        notes: list[str],
    ) -> Rewrite:
        """The rotations that modules do: inputs of leaves, and heads of queries and keys.  notes: grows"""
        rewrite = Rewrite()
        for i, site in enumerate(self._online_sites(topology, specs, model)):
            found = online_rotation(site, model, self.seed + 7919 * (i + 1))
            if self.is_worth_it(found, f"the input of {site}", specs, seen, model, reader, topology, notes):
                rewrite = rewrite.then(found)
        for module, size in head_sizes(topology, specs, model).items() if self.heads else ():
            block = largest_block(size)
            if not self.choose or _heads_gain(Site(module, "k"), size, block, specs, seen):
                config = ModuleConfig(HeadHadamard.name, {"size": size, "block": block})
                rewrite = rewrite.then(Rewrite(inserts={module: Insert(config, "tap:q,k")}))
            else:
                notes.append(f"{module}: queries and keys are not rotated; it would raise their measured error")
        return rewrite

    def block_of(self, link: Link) -> int:
        """Size of the Hadamard blocks in a link; SpecError where it should be whole and cannot."""
        size = link.size // link.heads
        block = largest_block(size)
        if block < size and self.odd_sizes == "refuse":
            raise SpecError(
                f"link {link.name!r}: no Hadamard matrix of size {size} is known; use odd_sizes='block' (blocks of {block}) or leave it out"
            )
        return block

    def is_worth_it(
        self,
        found: Rewrite,
        what: str,
        specs: Mapping[Site, QuantSpec],
        seen: Mapping[Site, Seen],
        model: nn.Module,
        reader: TensorReader,
        topology: Topology,
        notes: list[str],
    ) -> bool:
        """Whether the measured error falls; always, unless `choose`.  notes: grows where it does not"""
        if not self.choose:
            return True
        plain, rotated = rotation_errors(found, specs, seen, model, reader, topology)
        if rotated < plain:
            return True
        notes.append(f"{what} is not rotated: the relative error of what is rounded would go from {plain:.4g} to {rotated:.4g}")
        return False

    def _online_sites(self, topology: Topology, specs: Mapping[Site, QuantSpec], model: nn.Module) -> list[Site]:
        sites = []
        for pattern in self.online:
            matched = [s for s in topology.sites if fnmatchcase(str(s), pattern) and s not in sites]
            if not matched:
                raise SpecError(f"online={pattern!r} matches no weight site; there is, for instance, {topology.sites[0]}")
            sites += matched
        if self.rest:
            merged = {port.param for _, link in rotated_links(self, topology) for port in link.reads if port.axis == "in"}
            rounded = [s for s in topology.sites if s in specs and s.input in specs and s.param not in merged and s not in sites]
            sites += [s for s in rounded if isinstance(model.get_submodule(s.module), nn.Linear)]
        return sites


def rotated_links(options: HadamardRotate, topology: Topology) -> list[tuple[int, Link]]:
    """The links that these options rotate, each with its place among all that allow it."""
    return [(i, link) for i, link in enumerate(topology.links_with(Invariance.ROTATE)) if (options.residual if link.through else options.inner)]


def foreseen(options: HadamardRotate, topology: Topology, specs: Mapping[Site, QuantSpec], model: nn.Module) -> list[str]:
    """One sentence for everything that is not rotated as the options ask, with what is done instead."""
    notes = []
    links = rotated_links(options, topology)
    for _, link in links:
        if (block := options.block_of(link)) < (size := link.size // link.heads):
            notes.append(f"link {link.name}: no Hadamard matrix of size {size} is known, rotated in blocks of {block}")
    if options.residual and not any(link.through for _, link in links):
        why = next((w for p, w in topology.blocked.items() if "residual" in w), "no link of this family allows it")
        notes.append(f"the residual stream is not rotated: {why}; all other pairs apply")
    if options.rest:
        merged = {port.param for _, link in links for port in link.reads if port.axis == "in"}
        left = [s for s in topology.sites if s in specs and s.input in specs and s.param not in merged]
        stacks = [s for s in left if not isinstance(model.get_submodule(s.module), nn.Linear)]
        if stacks:
            notes.append(f"the inputs of {len(stacks)} weights such as {stacks[0]} are not rotated: only those of linear layers are, at run time")
        for size in sorted({in_features(s, model) for s in left if s not in stacks}):
            if (grown := padded_size(size)) != size:
                notes.append(f"inputs of {size} channels have no Hadamard matrix: padded with zeros to {grown} before they are rotated at run time")
    return notes


def in_features(site: Site, model: nn.Module) -> int:
    """K of a linear leaf's weight."""
    module = model.get_submodule(site.module)
    return int(module.in_features) if isinstance(module, nn.Linear) else int(getattr(module, site.tensor).shape[-1])


def head_sizes(topology: Topology, specs: Mapping[Site, QuantSpec], model: nn.Module) -> dict[str, int]:
    """Attention modules whose keys will be rounded, with the channels of one head."""
    found = {}
    for site in topology.activations:
        if site.tensor == "k" and site in specs and Site(site.module, "q") in topology.activations:
            module = model.get_submodule(site.module)
            size = getattr(module, "head_dim", None) or getattr(module, "size", None)
            if isinstance(size, int):
                found[site.module] = size
    return found


def _heads_gain(site: Site, size: int, block: int, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen]) -> bool:
    rows = seen.get(site, {}).get(Sample.name)
    if rows is None:
        return True
    plain, turned = rows.float(), HeadHadamard(size, block)(rows.float())
    return relative(fake_quantize(turned, specs[site]), turned) < relative(fake_quantize(plain, specs[site]), plain)


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
