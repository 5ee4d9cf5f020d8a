"""Keep what reads activation spikes apart: one token that is a thousand times as large as the others leaves a per-tensor scale nothing for them.

Where ρ, the largest token's magnitude over the median token's, exceeds a limit, the weight and what it reads get numbers that spikes do not harm; all
others keep what the recipe's rules say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from qcore.calibration.observers import Spikes
from qcore.errors import SpecError
from qcore.model.topology import Site
from qcore.numbers import QuantSpec, fp8_activation, fp8_weight
from qcore.solvers.allocate import Allocator, Choice, Look, Needs
from qcore.solvers.base import WeightSolver
from qcore.solvers.rtn import RTN


@dataclass(frozen=True, kw_only=True)
class SpikeAware(Allocator):
    """A keep-list by the ratio ρ of `Spikes` at each weight's input, in the float model.

    limit:       ρ above which a weight is kept.  LLaMA-2 and Mistral 7B have two to four weights (down projections) above 15 … 50; which limit is
                 best is a matter of the model
    kept:        how a kept weight is stored
    kept_inputs: and what it reads; dynamic, so that a spike spoils its own token alone
    solver:      of kept weights

    Source of ρ: activation spikes, https://arxiv.org/abs/2405.14428.
    """

    name: ClassVar[str] = "spike-aware"
    limit: float = 20.0
    kept: QuantSpec = field(default_factory=fp8_weight)
    kept_inputs: QuantSpec = field(default_factory=fp8_activation)
    solver: WeightSolver = field(default_factory=lambda: RTN(clip="none"))

    def __post_init__(self) -> None:
        if not self.limit >= 1:
            raise SpecError(f"the largest token is no smaller than the median one: a limit is 1 or more, got limit={self.limit}")
        if self.kept.when != "static" or self.kept_inputs.when != "dynamic":
            raise SpecError(f"kept weights have static scales and their inputs dynamic ones, got {self.kept} and {self.kept_inputs}")

    @property
    def solvers(self) -> tuple[WeightSolver, ...]:
        return (self.solver,)

    @property
    def needs(self) -> Needs:
        return "inputs"

    def problems(self, values: Mapping[Site, int], nbytes: Callable[[Site, QuantSpec], int | None]) -> list[str]:
        """Weights that could not be kept, should they have to be."""
        unfit = [site for site in values if nbytes(site, self.kept) is None]
        if not unfit:
            return []
        more = f" and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        return [f"allocator 'spike-aware' cannot store {unfit[0]}{more} as {self.kept}; set allocator.kept to a spec that fits"]

    def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
        """See `Allocator.allocate`; the inputs of kept weights get choices too."""
        choices: dict[Site, Choice] = {}
        for site, seen in look.observe({site: (Spikes(),) for site in sites}):
            ratio = seen[Spikes.name]
            if ratio > self.limit:
                why = f"spikes {ratio:.4g}, limit {self.limit:g}"
                choices[site] = Choice(self.kept, self.solver, why)
                choices[site.input] = Choice(self.kept_inputs, self.solver, why)
        return choices
