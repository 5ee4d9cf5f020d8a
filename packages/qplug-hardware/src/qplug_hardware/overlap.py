"""Which overlap o a BBFP of m mantissa bits should have: quality against cost, weighed as the paper does.

The cost here is a *proxy*, counted from bits and the widths of adders; nobody synthesised anything.  The paper's areas (TSMC 28 nm) are of designs
that were not released, so this proxy can order overlaps of one mantissa, and says little about how two mantissas, or BBFP and BFP, compare.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcore.errors import SpecError

from qplug_hardware.block_float import BBFP, BFP
from qplug_hardware.integer_dot import accumulator_bits

HALF = 0.5  # of a full adder: a half adder, and a multiplexer of two inputs


@dataclass(frozen=True)
class Cost:
    """What one multiply-accumulate takes, in full adders, and one value in memory, in bits.

    storage:    bits of a value, its share of the exponent included
    multiplier: m² cells of an array multiplier
    shifter:    two rows of multiplexers, by d for each flag
    adder:      full adders where the product's 2m bits lie, half adders above and below: there a carry alone has to go through (the paper's
                short carry chain)
    exponent:   the block's exponent adder, shared by its values
    """

    storage: float
    multiplier: float
    shifter: float
    adder: float
    exponent: float

    @property
    def logic(self) -> float:
        """All adders and multiplexers of a multiply-accumulate."""
        return self.multiplier + self.shifter + self.adder + self.exponent


def proxy_cost(fmt: BFP | BBFP, *, block: int = 32, exponent_bits: int = 5) -> Cost:
    """The proxy for a format with itself: BBFP(4,2) 39.7 full adders, BFP(4) 26.7."""
    m, d = fmt.mantissa, fmt.shift if isinstance(fmt, BBFP) else 0
    width = accumulator_bits(fmt, fmt, block)
    return Cost(
        storage=fmt.bits + exponent_bits / block,
        multiplier=float(m * m),
        shifter=HALF * ((2 * m + d) + (2 * m + 2 * d)) if d else 0.0,
        adder=2 * m + HALF * (width - 2 * m),
        exponent=exponent_bits / block,
    )


@dataclass(frozen=True)
class Candidate:
    """One overlap: its loss, its cost by the proxy, and the weighted score of both, each drawn out to 0 … 1 over the candidates; low is good."""

    overlap: int
    loss: float
    cost: float
    score: float


def choose_overlap(
    mantissa: int, loss: Callable[[int], float], *, weight: float = 0.5, overlaps: Sequence[int] | None = None, block: int = 32
) -> tuple[int, tuple[Candidate, ...]]:
    """The overlap of the lowest score, and all candidates.

    loss:     of the overlap o, lower is better: a perplexity, a KL divergence, or the squared error of a tensor
    weight:   of the loss, 0 to 1; the rest is that of the cost.  The paper does not state its weights; a half is inferred
    overlaps: to try; None = 1 … m - 1, as the paper does
    Ties go to the larger overlap, which is cheaper.
    Source: BBAL, https://arxiv.org/abs/2504.15721, section 3
    """
    if not 0 <= weight <= 1:
        raise SpecError(f"the weight of the loss is 0 to 1, got {weight}")
    tried = tuple(range(1, mantissa)) if overlaps is None else tuple(overlaps)
    if not tried:
        raise SpecError(f"BBFP with mantissa={mantissa} has no overlap from 1 to m - 1 to choose from; take 2 bits or more, or overlaps=[0]")
    losses = [float(loss(o)) for o in tried]
    if any(value != value for value in losses):
        raise SpecError(f"the loss of overlap {tried[[value != value for value in losses].index(True)]} is NaN; nothing can be chosen by it")
    costs = [proxy_cost(BBFP(mantissa, o), block=block).logic for o in tried]
    scores = [weight * a + (1 - weight) * b for a, b in zip(_drawn_out(losses), _drawn_out(costs), strict=True)]
    rows = tuple(Candidate(*row) for row in zip(tried, losses, costs, scores, strict=True))
    return min(rows, key=lambda c: (c.score, -c.overlap)).overlap, rows


def _drawn_out(values: Sequence[float]) -> list[float]:
    """Min-max normalised; all zero where they are all alike."""
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]
