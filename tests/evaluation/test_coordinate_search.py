"""Climbing, against looking at everything."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vaecf.evaluation import coordinate_search

GRIDS = {"a": (1.0, 2.0, 5.0, 10.0), "b": (0, 10, 20), "c": (0.1, 0.3)}
TURNS = tuple({key: 1} for key in GRIDS)
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

    found = coordinate_search.climb_in_turns(GRIDS, TURNS, start, value)
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

    assert coordinate_search.climb_in_turns(GRIDS, TURNS, start, value) == top


def test_along_a_ridge():
    """No key alone makes it better: two have to move together."""
    grids = {"a": (1.0, 2.0, 4.0, 8.0), "b": (1.0, 2.0, 4.0, 8.0)}
    start = {"a": 1.0, "b": 8.0}

    def value(choice):
        off = abs(np.log2(choice["a"] * choice["b"] / 8))
        return -off - abs(np.log2(choice["a"] / 8)) / 2

    alone = ({"a": 1}, {"b": 1})
    assert coordinate_search.climb_in_turns(grids, alone, start, value) == start
    together = ({"a": 1}, {"b": 1, "a": -1})
    found = coordinate_search.climb_in_turns(grids, together, start, value)
    assert found == {"a": 8.0, "b": 1.0}


def test_nested_where_the_best_hang_together():
    """More of a wants more of b: neither alone is better at the start."""
    grids = {"a": (1, 2, 3, 4), "b": (1, 2, 3, 4)}
    asked = []

    def value(choice):
        asked.append((choice["a"], choice["b"]))
        return choice["a"] - 3 * abs(choice["a"] - choice["b"])

    start = {"a": 1, "b": 1}
    alone = ({"a": 1}, {"b": 1})
    assert coordinate_search.climb_in_turns(grids, alone, start, value) == start
    asked.clear()
    found = coordinate_search.climb_nested(
        "a", grids, ({"b": 1},), start, value
    )
    assert found == {"a": 4, "b": 4}
    assert asked[0] == (1, 1)  # begins with what is given
    assert (4, 1) not in asked  # goes on where the one before ended


def test_begins_between_the_grids_values():
    found = coordinate_search.climb_in_turns(
        {"a": (1.0, 10.0)},
        ({"a": 1},),
        {"a": 3.0},
        lambda c: -abs(c["a"] - 3.0),
    )
    assert found == {"a": 3.0}
    found = coordinate_search.climb_in_turns(
        {"a": (1.0, 10.0)}, ({"a": 1},), {"a": 3.0}, lambda c: c["a"]
    )
    assert found == {"a": 10.0}


def test_of_equal_ones_the_first_stays():
    tried = []
    found = coordinate_search.climb(
        (1, 2, 3, 4), 2, lambda x: tried.append(x) or 0.0
    )
    assert found == 2
    assert set(tried) == {1, 2, 3}
