"""What the recipe says about each site: its spec, solver, packing, the range of what it reads."""

from typing import Any

from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import Moments
from qcore.calibration.ranges import range_observer, range_parts
from qcore.errors import at
from qcore.model.topology import Block, Site, Topology
from qcore.numbers import QuantSpec
from qcore.packing import first_that_accepts
from qcore.recipe import Recipe
from qcore.solvers.base import WeightSolver
from qcore.transforms.rewrite import Rewrite


class Wishes:
    """The recipe, asked site by site.

    recipe:  may be exchanged: an allocator adds rules
    specs:   site → what to store; sites that a transform makes are added when they are asked for
    instead: site → the solver that stands in, where calibration data did not reach the site
    """

    def __init__(self, recipe: Recipe, registry: Any, specs: dict[Site, QuantSpec], dtype_name: str) -> None:
        self.recipe, self.registry, self.specs, self.dtype_name = recipe, registry, specs, dtype_name
        self.instead: dict[Site, WeightSolver] = {}

    def spec(self, site: Site) -> QuantSpec:
        """What to store for a weight."""
        spec = self.specs.get(site)
        if spec is None:
            spec = self.recipe.specs_for([site], self.dtype_name)[site]
            self.specs[site] = spec
        return spec

    def solver(self, site: Site) -> WeightSolver:
        """Who chooses the codes of a weight."""
        if site in self.instead:
            return self.instead[site]
        rule = self.recipe.rule_for(site)
        return rule.solver if rule is not None and rule.solver is not None else self.recipe.solver

    def reads(self, site: Site) -> QuantSpec | None:
        """The spec of what a weight reads."""
        return self.activation(site.input)

    def activation(self, site: Site) -> QuantSpec | None:
        """The spec of an activation site: a layer's input, or a tensor inside a module."""
        if site not in self.specs:  # a leaf that a split made of one
            self.specs |= self.recipe.specs_for([site], None)
        return self.specs.get(site)

    def _packings(self, site: Site) -> list[Any]:
        rule = self.recipe.rule_for(site)
        if rule is not None and rule.packing is not None:
            return [self.registry.packings[rule.packing]()]
        return [cls() for cls in self.registry.packings.values()]

    def packing(self, site: Site, shape: tuple[int, ...]) -> Any:
        """The layout in which a weight's codes are kept: the first that can."""
        return self.packing_for(site, self.spec(site), shape)

    def packing_for(self, site: Site, spec: QuantSpec, shape: tuple[int, ...]) -> Any:
        """That of a weight if it had this spec."""
        return first_that_accepts(self._packings(site), spec, shape, self.reads(site))

    def stages(self, block: Block, rewrite: Rewrite) -> list[list[Site]]:
        """The block's stages, without sites that stay float; a weight that was split stands there as its parts."""
        derived: dict[str, list[str]] = {}
        for new, old in rewrite.derived.items():
            derived.setdefault(old, []).append(new)
        stages = []
        for stage in block.stages:
            sites = []
            for site in stage:
                names = derived.get(site.param, [site.param]) if site.param in rewrite.dropped else [site.param]
                parts = [site] if names == [site.param] else [Site(path, own) for path, _, own in (n.rpartition(".") for n in names)]
                sites += [s for s in parts if self.recipe.specs_for([s], self.dtype_name)]
            if sites:
                stages.append(sites)
        return stages

    # activations -------------------------------------------------------------------------------------------------------------------------

    def is_static(self, site: Site) -> bool:
        """Whether an activation has scales that calibration finds."""
        spec = self.activation(site)
        return spec is not None and spec.when == "static" and spec.scaled

    def range_observers(self, site: Site) -> tuple[Observer, ...]:
        """What looks at the range of a static activation; nothing for others."""
        if not self.is_static(site):
            return ()
        rule, spec = self.recipe.rule_for(site), self.activation(site)
        assert rule is not None and spec is not None
        with at(site):
            return (range_observer(spec, rule.observer),)

    def static_parts(self, site: Site, seen: Seen) -> dict[str, Tensor]:
        """Scale and offset of a static activation, from what its range observer saw."""
        rule, spec = self.recipe.rule_for(site), self.activation(site)
        assert rule is not None and spec is not None
        with at(site):
            return range_parts(seen["range"], spec, "minmax" if rule.observer is None else rule.observer.name)

    def bias_observers(self, site: Site) -> tuple[Observer, ...]:
        """What measures E[x] at the input of a weight whose layer's bias is to be corrected."""
        return (Moments(),) if self.corrects_bias(site) else ()

    def corrects_bias(self, site: Site) -> bool:
        """Whether the recipe wants the bias of this weight's layer corrected; parts of stacks and slices of weights have none of their own."""
        return self.recipe.correct_bias and site.tensor == "weight" and site.part is None and not site.channels

    def needs_data(self, topology: Topology) -> bool:
        """Whether anything in the recipe looks at calibration data."""
        sites = [s for s in topology.sites if s in self.specs]
        observing = (
            self.recipe.block_solver is not None
            or any(self.solver(s).observes or self.is_static(s.input) or self.corrects_bias(s) for s in sites)
            or any(self.is_static(s) for s in topology.activations)
        )
        block_wants = any(t.wants(topology.within(b), self.specs) for t in self.recipe.transforms if t.scope == "block" for b in topology.blocks[:1])
        return observing or block_wants
