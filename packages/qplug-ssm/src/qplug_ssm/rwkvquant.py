"""RWKVQuant: each weight is stored by scalar or by vector quantization, as the spread of its values suggests.

Source: https://arxiv.org/abs/2505.03803.  Weights whose values are uniform (both proxies small) are stored as integers in groups, solved by GPTQ; the
others with codebooks, solved by GPTVQ; element-wise vectors with one weighted codebook each.  At 3 bits: 0.9 · 3.25 + 0.1 · 3.5 = 3.275 bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from qcore.errors import SpecError
from qcore.model.topology import Site
from qcore.numbers import Int, PerGroup, QuantSpec
from qcore.numbers.formats import LowRankCodebook
from qcore.numbers.granularity import UnscaledTile
from qcore.solvers.allocate import Allocator, Choice, Look
from qcore.solvers.base import WeightSolver
from qcore.solvers.gptq import GPTQ
from qcore.solvers.gptvq import GPTVQ

from qplug_ssm.proxy import Proxies, proxies


def scalar_spec(bits: int = 3, group: int = 64) -> QuantSpec:
    """Symmetric integers, one float16 scale for each group of a row: bits + 16/group in all."""
    return QuantSpec(format=Int(bits), granularity=PerGroup(group), scale="float16")


def vector_spec(bits: int = 3, rows: int = 2, columns: int = 32) -> QuantSpec:
    """A codebook of 2^bits 8-bit numbers for every `rows` × `columns` tile, stored at half its size by a shared basis: 3.5 bits at 3 and 2 × 32."""
    return QuantSpec(format=LowRankCodebook(bits, rank=2 ** (bits - 1)), granularity=UnscaledTile(rows, columns))


@dataclass(frozen=True, kw_only=True)
class RWKVQuant(Allocator):
    """Scalar quantization where both proxies lie below their thresholds, vector quantization elsewhere; the specs as they are given here.

    scalar_share: of the weights, by number, that shall be stored as integers.  The coarse threshold is set so that a third of the rest lies above it,
                  the fine one so that the share is met
    coarse, fine: thresholds that are set by hand instead; both or none
    proxy:        "gaps"; "crest": the released code's rule, max |w| √n / ‖w‖ ≤ crest_limit, which knows neither share nor thresholds
    unique_gaps:  drop repeated gaps, as the released code does; the paper's thresholds need it
    sites:        "weight": of matrices only.  Others (element-wise vectors) keep what the recipe says
    """

    name: ClassVar[str] = "rwkvquant"
    scalar_share: float = 0.9
    coarse: float | None = None
    fine: float | None = None
    proxy: Literal["gaps", "crest"] = "gaps"
    crest_limit: float = 8.0
    unique_gaps: bool = False
    scalar: QuantSpec = field(default_factory=scalar_spec)
    vector: QuantSpec = field(default_factory=vector_spec)
    scalar_solver: WeightSolver = field(default_factory=GPTQ)
    vector_solver: WeightSolver = field(default_factory=GPTVQ)

    def __post_init__(self) -> None:
        if not 0 <= self.scalar_share <= 1:
            raise SpecError(f"scalar_share is a share of the weights, 0 to 1, got {self.scalar_share}")
        if (self.coarse is None) != (self.fine is None):
            raise SpecError(f"thresholds come in pairs, got coarse={self.coarse} and fine={self.fine}; give both, or none and a scalar_share")
        if self.proxy not in ("gaps", "crest"):
            raise SpecError(f"unknown proxy {self.proxy!r}; have: gaps, crest")

    @property
    def solvers(self) -> tuple[WeightSolver, ...]:
        return self.scalar_solver, self.vector_solver

    def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
        """Every weight is read once, for its proxies; then the thresholds are set."""
        own = [s for s in sites if s.tensor == "weight"]
        found = {site: proxies(look.weight(site), unique_gaps=self.unique_gaps) for site in own}
        coarse, fine = self.thresholds(list(found.values()))
        choices = {}
        for site, p in found.items():
            scalar = p.crest <= self.crest_limit if self.proxy == "crest" else is_scalar(p, coarse, fine)
            gaps = f"coarse {p.coarse:.4g} (limit {coarse:.4g}), fine {p.fine:.4g} (limit {fine:.4g})"
            why = f"crest {p.crest:.4g} (limit {self.crest_limit:.4g})" if self.proxy == "crest" else gaps
            spec, solver = (self.scalar, self.scalar_solver) if scalar else (self.vector, self.vector_solver)
            choices[site] = Choice(spec, solver, f"{'scalar' if scalar else 'vector'}: {why}")
        return choices

    def thresholds(self, found: Sequence[Proxies]) -> tuple[float, float]:
        """The coarse and the fine limit."""
        if self.coarse is not None and self.fine is not None:
            return self.coarse, self.fine
        vectors = len(found) - round(self.scalar_share * len(found))
        by_coarse = vectors // 3
        coarse = _above(sorted((p.coarse for p in found), reverse=True), by_coarse)
        rest = sorted((p.fine for p in found if p.coarse < coarse), reverse=True)
        return coarse, _above(rest, vectors - (len(found) - len(rest)))


def is_scalar(p: Proxies, coarse: float, fine: float) -> bool:
    """A proxy that is not a number means vectors."""
    return p.coarse < coarse and p.fine < fine


def _above(falling: Sequence[float], count: int) -> float:
    """A limit that `count` of the values do not lie below."""
    if count <= 0 or not falling:
        return float("inf")
    if count >= len(falling):
        return float("-inf")
    return (falling[count - 1] + falling[count]) / 2 if falling[count - 1] > falling[count] else falling[count - 1]
