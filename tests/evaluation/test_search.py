"""Climbing, against looking at everything."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from vaecf.evaluation import search

GRIDS = {"a": (1.0, 2.0, 5.0, 10.0), "b": (0, 10, 20), "c": (0.1, 0.3)}
CHOICES = [
    dict(zip(GRIDS, values)) for values in itertools.product(*GRIDS.values())
]


@given(
    st.lists(st.integers(0, 9), min_size=24, max_size=24),
    st.sampled_from(CHOICES),
)
def test_no_neighbour_is_better(values, start):
    table = {tuple(c.values()): v for c, v in zip(CHOICES, values)}
    asked = []

    def value(choice):
        asked.append(choice)
        return table[tuple(choice.values())]

    found = search.climb_in_turns(GRIDS, start, value)
    best = value(found)
    assert best >= value(start)
    assert best == max(value(c) for c in list(asked))
    for key, grid in GRIDS.items():
        at = grid.index(found[key])
        for other in grid[max(0, at - 1) : at + 2]:
            assert value({**found, key: other}) <= best


@given(st.sampled_from(CHOICES), st.sampled_from(CHOICES))
def test_finds_a_single_top(top, start):
    def value(choice):
        return -sum(
            abs(grid.index(choice[key]) - grid.index(top[key]))
            for key, grid in GRIDS.items()
        )

    assert search.climb_in_turns(GRIDS, start, value) == top


def test_begins_between_the_grids_values():
    found = search.climb_in_turns(
        {"a": (1.0, 10.0)}, {"a": 3.0}, lambda c: -abs(c["a"] - 3.0)
    )
    assert found == {"a": 3.0}
    found = search.climb_in_turns(
        {"a": (1.0, 10.0)}, {"a": 3.0}, lambda c: c["a"]
    )
    assert found == {"a": 10.0}


def test_of_equal_ones_the_first_stays():
    tried = []
    found = search.climb((1, 2, 3, 4), 2, lambda x: tried.append(x) or 0.0)
    assert found == 2
    assert set(tried) == {1, 2, 3}
