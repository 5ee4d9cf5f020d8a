"""Who gets which choice under a budget: one choice for each item, the summed cost at most the budget, the summed score as small as can be.

scores, costs: one list for each item, one entry for each of its choices.  All return the index of each item's choice, and never exceed the budget.

| function | how |
|---|---|
| knapsack | exact, by dynamic programming over all costs that can be reached |
| greedy | from the cheapest choices, the step that saves most score per byte, as long as one fits |
| prefix | all at their dearest, then the least sensitive items to their cheapest, one after the other, until it fits |
| threshold | items more sensitive than a limit at their dearest, the others at their cheapest |

An item's sensitivity is what it costs to go from its dearest choice to its cheapest.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from qcore.errors import SpecError

log = logging.getLogger("qcore.solvers.knapsack")

Table = Sequence[Sequence[float]]
Costs = Sequence[Sequence[int]]
_MOST_STATES = 1 << 20


def smallest(costs: Costs) -> int:
    """The least that any allocation costs."""
    return sum(min(own) for own in costs)


def total(table: Table | Costs, chosen: Sequence[int]) -> float:
    """What an allocation sums up to."""
    return sum(own[i] for own, i in zip(table, chosen, strict=True))


def knapsack(scores: Table, costs: Costs, budget: int) -> list[int]:
    """The allocation of least score.

    States that another one beats in cost and score are dropped, and so are those that cannot become better than the greedy allocation.  Where more
    than a million remain, costs are rounded up to a grid, with a warning: the result is then no worse than greedy, but may miss the best.
    """
    first = greedy(scores, costs, budget)
    limit = total(scores, first)
    rest_cost, rest_score = [0], [0.0]
    for own_cost, own_score in zip(reversed(costs), reversed(scores), strict=True):
        rest_cost.append(rest_cost[-1] + min(own_cost))
        rest_score.append(rest_score[-1] + min(own_score))
    rest_cost.reverse()
    rest_score.reverse()
    cost, score = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    back: list[tuple[Tensor, Tensor]] = []
    for i, (own_cost, own_score) in enumerate(zip(costs, scores, strict=True)):
        n = len(own_cost)
        new_cost = (cost.unsqueeze(1) + torch.tensor(own_cost)).flatten()
        new_score = (score.unsqueeze(1) + torch.tensor(own_score, dtype=torch.float64)).flatten()
        room = new_cost + rest_cost[i + 1] <= budget
        hope = new_score + rest_score[i + 1] <= limit + 1e-12 * abs(limit)
        index = (room & hope).nonzero().squeeze(1)
        if not len(index):
            return first  # sums in another order can hide the greedy allocation itself, never a better one
        index = _undominated(new_cost, new_score, index)
        if len(index) > _MOST_STATES:
            log.warning("the exact allocation has more than %d states at item %d; costs are rounded up from here on", _MOST_STATES, i)
            step = -(-budget // _MOST_STATES)
            index = _undominated(-(-new_cost // step) * step, new_score, index)
        back.append((index // n, index % n))
        cost, score = new_cost[index], new_score[index]
    best = int(score.argmin())
    if float(score[best]) > limit:
        return first
    chosen = []
    for previous, choice in reversed(back):
        chosen.append(int(choice[best]))
        best = int(previous[best])
    return chosen[::-1]


def _undominated(cost: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """Those of `index` that no other beats: by rising cost, each of smaller score than all before it."""
    order = index[score[index].argsort(stable=True)]
    order = order[cost[order].argsort(stable=True)]
    s = score[order]
    before = torch.cat([torch.tensor([torch.inf], dtype=s.dtype), s.cummin(0).values[:-1]])
    return order[s < before]


def greedy(scores: Table, costs: Costs, budget: int) -> list[int]:
    """The steps that save most score per byte, one after the other, from the cheapest choices."""
    chosen = _cheapest(scores, costs, budget)
    room = budget - int(total(costs, chosen))
    while True:
        best: tuple[float, int, int] | None = None
        for item, now in enumerate(chosen):
            for i, cost in enumerate(costs[item]):
                extra, saved = cost - costs[item][now], scores[item][now] - scores[item][i]
                if saved > 0 and extra <= room:
                    rate = saved / extra if extra > 0 else float("inf")
                    if best is None or rate > best[0]:
                        best = (rate, item, i)
        if best is None:
            return chosen
        _, item, i = best
        room -= costs[item][i] - costs[item][chosen[item]]
        chosen[item] = i


def prefix(scores: Table, costs: Costs, budget: int) -> list[int]:
    """The fewest items, the least sensitive first, at their cheapest; all others at their dearest."""
    low, high = _cheapest(scores, costs, budget), _dearest(scores, costs)
    chosen = list(high)
    for item in sorted(range(len(costs)), key=lambda k: sensitivity(scores[k], low[k], high[k])):
        if total(costs, chosen) <= budget:
            break
        chosen[item] = low[item]
    return chosen


def threshold(scores: Table, costs: Costs, budget: int, limit: float) -> list[int]:
    """Items more sensitive than `limit` at their dearest; SpecError where that exceeds the budget."""
    low, high = _cheapest(scores, costs, budget), _dearest(scores, costs)
    chosen = [h if sensitivity(own, a, h) > limit else a for own, a, h in zip(scores, low, high, strict=True)]
    spent = int(total(costs, chosen))
    if spent > budget:
        kept = sum(c == h for c, h in zip(chosen, high, strict=True))
        what = f"threshold {limit:g} keeps {kept} of {len(chosen)} weights at their dearest"
        raise SpecError(f"{what}, which takes {spent} bytes of {budget}; raise it, or the budget")
    return chosen


def sensitivity(scores: Sequence[float], low: int, high: int) -> float:
    """What the step from the choice `high` to `low` costs in score."""
    return scores[low] - scores[high]


def _cheapest(scores: Table, costs: Costs, budget: int) -> list[int]:
    """The cheapest choice of each item, the better one of two that cost alike; SpecError where even these exceed the budget."""
    chosen = [min(range(len(c)), key=lambda i, c=c, s=s: (c[i], s[i])) for s, c in zip(scores, costs, strict=True)]  # type: ignore[misc]
    if (least := smallest(costs)) > budget:
        raise SpecError(f"a budget of {budget} bytes is below the smallest choice, {least} bytes")
    return chosen


def _dearest(scores: Table, costs: Costs) -> list[int]:
    return [max(range(len(c)), key=lambda i, c=c, s=s: (c[i], -s[i])) for s, c in zip(scores, costs, strict=True)]  # type: ignore[misc]
