"""An allocation that is found once: a resumed run reads what the interrupted one chose, instead of measuring for minutes again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qcore.checkpoint.journal import Journal
from qcore.errors import CheckpointError, SpecError
from qcore.model.topology import Site
from qcore.numbers import QuantSpec
from qcore.recipe import Recipe, Rule
from qcore.recipe_file import dump, parse_recipe
from qcore.solvers.allocate import Allocator, Choice, Look, Needs
from qcore.solvers.base import WeightSolver
from qcore.solvers.rtn import RTN

STEP = "allocation"


def with_kept_allocation(recipe: Recipe, journal: Journal, registry: Any) -> Recipe:
    """The same recipe; what its allocator chooses, if it has one, is kept in the journal before the first block is solved."""
    return recipe if recipe.allocator is None else replace(recipe, allocator=KeptAllocation(recipe.allocator, journal, registry))


@dataclass(frozen=True)
class KeptAllocation(Allocator):
    """`inner`, asked once in the life of a journal.

    Choices are kept as rules of a recipe, one for each site: what a recipe file cannot say (a solver that is built in Python of objects without a
    name) is not kept, and is found anew; so is what chooses for other sites than those that were asked about.
    """

    inner: Allocator
    journal: Journal
    registry: Any

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    @property
    def solvers(self) -> tuple[WeightSolver, ...]:
        return self.inner.solvers

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def problems(self, values: Mapping[Site, int], nbytes: Callable[[Site, QuantSpec], int | None]) -> list[str]:
        """See `Allocator.problems`."""
        return self.inner.problems(values, nbytes)

    def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
        """See `Allocator.allocate`.  CheckpointError where the journal's choices are about sites that this run does not have."""
        kept = self.journal.step(STEP)
        if kept is not None:
            return self._read(kept[1], sites)
        choices = self.inner.allocate(sites, look)
        if not choices.keys() <= set(_known(sites).values()):
            return choices
        rules = tuple(Rule(str(site), c.spec, c.solver, scale="spec") for site, c in choices.items())
        try:
            text = dump(Recipe(name=STEP, rules=rules, solver=RTN()))
        except SpecError:
            return choices
        self.journal.keep_step(STEP, {}, {"rules": text, "why": [c.why for c in choices.values()]})
        return choices

    def _read(self, data: Mapping[str, Any], sites: Sequence[Site]) -> Mapping[Site, Choice]:
        known = _known(sites)
        choices = {}
        for rule, why in zip(parse_recipe(data["rules"], self.registry, STEP).rules, data["why"], strict=True):
            if rule.sites not in known:
                raise CheckpointError(f"{self.journal.folder} holds a choice for {rule.sites}, which is not here; delete it and start again")
            assert rule.spec is not None and rule.solver is not None
            choices[known[rule.sites]] = Choice(rule.spec, rule.solver, why)
        return choices


def _known(sites: Sequence[Site]) -> dict[str, Site]:
    """The weights that an allocator is asked about and their inputs, by name."""
    return {str(s): s for site in sites for s in (site, site.input)}
