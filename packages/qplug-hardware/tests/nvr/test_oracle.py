"""Belady's rule against every choice there is."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st
from qplug_hardware.nvr.oracle import fewest_fetches


def by_trying(wanted, capacity):
    @cache
    def least(i, held):
        if i == len(wanted):
            return 0
        if wanted[i] in held:
            return least(i + 1, held)
        if len(held) < capacity:
            return 1 + least(i + 1, held | {wanted[i]})
        return 1 + min(least(i + 1, held - {gone} | {wanted[i]}) for gone in held)

    return least(0, frozenset())


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=14), st.integers(1, 4))
def test_no_choice_of_victims_fetches_less(wanted, capacity):
    fetched = fewest_fetches(wanted, capacity)
    assert sum(fetched) == by_trying(tuple(wanted), capacity)
    # and the first request for a line is always a fetch
    assert all(fetched[i] for i, line in enumerate(wanted) if line not in wanted[:i])
