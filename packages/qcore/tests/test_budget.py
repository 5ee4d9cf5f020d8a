"""Budgets: what is parsed, what is refused, and that streaming is chosen where memory is short."""

from dataclasses import replace

import pytest
from qcore.budget import Footprint, choose_budget, parse_bytes, too_small
from qcore.errors import SpecError
from qcore.numbers import int_weight
from qcore.pipeline import load_in_memory
from qcore.plan import make_plan
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import GPTQ
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder

GIB = 1 << 30
PRINT = Footprint(base=GIB, whole=8 * GIB, outside=GIB, block=GIB, solve=GIB, data=GIB, hidden=GIB, packed=GIB)


@pytest.mark.parametrize(
    ("text", "n"), [("3GiB", 3 * GIB), ("1.5 gib", 3 * GIB // 2), ("2G", 2 * 10**9), ("500MB", 5 * 10**8), ("77", 77), ("8k", 8000)]
)
def test_amounts_of_memory(text, n):
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "lots", "-3G", "3XB", "3 Gi B", "1e9"])
def test_what_is_no_amount(text):
    with pytest.raises(SpecError, match="write it like 3GiB"):
        parse_bytes(text)


def test_streaming_takes_less_and_is_chosen_only_where_it_must():
    assert PRINT.streamed < PRINT.in_memory
    assert choose_budget(PRINT, PRINT.in_memory).stream is False
    assert choose_budget(PRINT, PRINT.in_memory - 1).stream is True
    assert choose_budget(PRINT, PRINT.in_memory - 1, streams=False).stream is False
    assert choose_budget(PRINT, None, wanted=True).stream is True


def test_outputs_are_kept_in_what_is_left():
    assert choose_budget(PRINT, PRINT.streamed + 12345).keep == 12345
    assert choose_budget(PRINT, PRINT.streamed).keep == 0
    assert choose_budget(PRINT, 100 * GIB).keep == 2 * GIB


def test_a_limit_that_is_too_small_is_refused_with_the_smallest_that_would_do():
    assert too_small(PRINT, PRINT.streamed) is None
    problem = too_small(PRINT, PRINT.streamed - 1)
    assert problem is not None
    smallest = parse_bytes(problem.rpartition("--max-ram ")[2])
    assert too_small(PRINT, smallest) is None
    assert abs(smallest - choose_budget(PRINT, None).smallest) < 1 << 10
    # another process that has imported a little more finds the same limit enough
    assert too_small(replace(PRINT, base=PRINT.base + (10 << 20)), smallest) is None
    assert too_small(PRINT, PRINT.streamed, streams=False) is not None
    assert choose_budget(PRINT, None, streams=False).smallest > PRINT.in_memory


def test_the_plan_says_what_will_be_done():
    recipe = Recipe(rules=(Rule("*:weight", int_weight(4, 16)),), solver=GPTQ())

    def plan(**options):
        return make_plan(load_in_memory(tiny_decoder()), recipe, TinyDecoderAdapter(), Registry(""), **options)

    made = plan(max_ram=1 << 40)
    assert made.budget is not None and not made.budget.stream and not made.problems
    assert plan(max_ram=1 << 20).problems[0].startswith("--max-ram 0.00GiB is less than this run needs")
    streamed = plan(max_ram=1 << 40, stream=True)
    assert streamed.budget is not None and streamed.budget.stream
    said = streamed.to_dict()["memory"]
    assert (said["streamed"], said["limit_bytes"], said["estimate_bytes"]) == (True, 1 << 40, streamed.budget.footprint.streamed)
