"""Mixed precision: the candidates that cost the model least, under a budget in stored bits per weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from qcore.errors import SpecError
from qcore.model.topology import Site
from qcore.numbers import QuantSpec, int_weight
from qcore.solvers.allocate import Allocator, Choice, Look, Needs
from qcore.solvers.base import WeightSolver
from qcore.solvers.gptq import GPTQ
from qcore.solvers.knapsack import greedy, knapsack, prefix, smallest, threshold, total
from qcore.solvers.rtn import RTN
from qcore.solvers.sensitivity import METRICS, NEEDS, Metric, Trial, score


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a weight may get.  solver: None = the allocator's"""

    spec: QuantSpec
    solver: WeightSolver | None = None


def _widths() -> tuple[Candidate, ...]:
    return tuple(Candidate(spec=int_weight(b, 64)) for b in (2, 3, 4, 6))


@dataclass(frozen=True, kw_only=True)
class Mixed(Allocator):
    """Score every weight under every candidate, then choose under a budget of packed bits per weight.

    bits:       the budget: packed bytes of all weights, scales and codebooks included, times 8 over their number.  Never exceeded
    candidates: specs, each with a solver of its own if it wants one; a weight that a spec does not fit has the others
    metric:     what a candidate costs the model (docs/mixed-precision.md)
    choose:     "knapsack": the least sum of scores; "greedy": the best step per byte; "prefix": the least sensitive weights to their cheapest
                candidate until it fits; "threshold": weights more sensitive than `limit` keep their dearest, and the others get their cheapest
    solver:     of candidates that name none
    probe:      rounds the weights whose damage is measured; nearest rounding is quick, and only the order of weights matters
    batches:    calibration batches that the whole model is run on, for metrics that do
    """

    name: ClassVar[str] = "mixed"
    bits: float = 3.5
    candidates: tuple[Candidate, ...] = field(default_factory=_widths)
    metric: Metric = "kl"
    choose: Literal["knapsack", "greedy", "prefix", "threshold"] = "knapsack"
    limit: float | None = None
    solver: WeightSolver = field(default_factory=GPTQ)
    probe: WeightSolver = field(default_factory=RTN)
    batches: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.bits > 0:
            raise SpecError(f"a budget is a positive number of bits per weight, got bits={self.bits}")
        if not self.candidates:
            raise SpecError("an allocator needs at least one candidate, and better two")
        if self.metric not in METRICS:
            raise SpecError(f"unknown metric {self.metric!r}; have: {', '.join(METRICS)}")
        if self.choose not in ("knapsack", "greedy", "prefix", "threshold"):
            raise SpecError(f"unknown way to choose {self.choose!r}; have: knapsack, greedy, prefix, threshold")
        if (self.limit is None) == (self.choose == "threshold"):
            raise SpecError(f'a limit goes with choose = "threshold" and with nothing else, got choose={self.choose!r} and limit={self.limit}')
        if self.batches < 1:
            raise SpecError(f"at least one batch is needed, got batches={self.batches}")

    @property
    def solvers(self) -> tuple[WeightSolver, ...]:
        return (self.probe, *(c.solver or self.solver for c in self.candidates))

    @property
    def needs(self) -> Needs:
        return NEEDS[self.metric]

    def problems(self, values: Mapping[Site, int], nbytes: Callable[[Site, QuantSpec], int | None]) -> list[str]:
        """A weight that no candidate fits, or a budget below the smallest choice."""
        costs = {site: [n for c in self.candidates if (n := nbytes(site, c.spec)) is not None] for site in values}
        if unfit := [str(site) for site, own in costs.items() if not own]:
            return [f"allocator 'mixed' has no candidate that fits {unfit[0]}{f' and {len(unfit) - 1} more' if len(unfit) > 1 else ''}; add one"]
        least = 8 * smallest(list(costs.values())) / max(sum(values.values()), 1)
        if least > self.bits:
            return [f"a budget of {self.bits:g} bits per weight is below the smallest choice, {least:.4f} bits; raise it, or add a smaller candidate"]
        return []

    def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
        """See `Allocator.allocate`."""
        sizes = {site: look.weight(site).numel() for site in sites}
        for problem in self.problems(sizes, look.nbytes):
            raise SpecError(problem)
        specs = tuple(look.stored(c.spec) for c in self.candidates)
        found = score(self.metric, sites, look, Trial(specs, self.probe, self.batches, self.seed))
        fits = {site: sorted(found[site]) for site in sites}
        scores = [[found[site][i] for i in fits[site]] for site in sites]
        costs = [[_known(look.nbytes(site, specs[i])) for i in fits[site]] for site in sites]
        budget = int(self.bits * sum(sizes.values()) / 8)
        if self.choose == "threshold":
            assert self.limit is not None
            chosen = threshold(scores, costs, budget, self.limit)
        else:
            chosen = {"knapsack": knapsack, "greedy": greedy, "prefix": prefix}[self.choose](scores, costs, budget)
        assert total(costs, chosen) <= budget, (total(costs, chosen), budget)
        choices = {}
        for site, own, prices, pick in zip(sites, scores, costs, chosen, strict=True):
            candidate = self.candidates[fits[site][pick]]
            why = f"{self.metric} {own[pick]:.3g} (at the cheapest {own[min(range(len(own)), key=lambda i, p=prices: p[i])]:.3g})"  # type: ignore[misc]
            choices[site] = Choice(candidate.spec, candidate.solver or self.solver, f"{8 * prices[pick] / sizes[site]:.3f} bits: {why}")
        return choices


def _known(n: int | None) -> int:
    assert n is not None
    return n
