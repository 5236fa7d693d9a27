"""The coordinate search against an exhaustive search."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vaecf.evaluation.coordinate_search import coordinate_search

GRIDS = {"a": (1.0, 2.0, 5.0, 10.0), "b": (0, 10, 20), "c": (0.1, 0.3)}
POINTS = [
    dict(zip(GRIDS, values)) for values in itertools.product(*GRIDS.values())
]


@given(
    st.lists(st.integers(0, 9), min_size=24, max_size=24),
    st.sampled_from(POINTS),
)
def test_no_neighbour_is_better(values, start):
    table = {tuple(p.values()): v for p, v in zip(POINTS, values)}
    asked = []

    def value(point):
        asked.append(point)
        return table[tuple(point.values())]

    found = coordinate_search(value, GRIDS, start)
    best = value(found)
    assert best >= value(start)
    assert best == max(value(p) for p in list(asked))
    for key, grid in GRIDS.items():
        at = grid.index(found[key])
        for other in grid[max(0, at - 1) : at + 2]:
            assert value({**found, key: other}) <= best


def test_a_diagonal_direction_follows_a_ridge():
    """Moving one key alone does not help: two have to move together."""
    grids = {"a": (1.0, 2.0, 4.0, 8.0), "b": (1.0, 2.0, 4.0, 8.0)}
    start = {"a": 1.0, "b": 8.0}

    def value(point):
        off = abs(np.log2(point["a"] * point["b"] / 8))
        return -off - abs(np.log2(point["a"] / 8)) / 2

    assert coordinate_search(value, grids, start) == start
    together = ({"a": 1}, {"b": 1, "a": -1})
    found = coordinate_search(value, grids, start, directions=together)
    assert found == {"a": 8.0, "b": 1.0}


def test_nested_search_where_the_best_values_depend_on_each_other():
    """A larger a needs a larger b: neither alone is better at the start."""
    grids = {"a": (1, 2, 3, 4), "b": (1, 2, 3, 4)}
    asked = []

    def value(point):
        asked.append((point["a"], point["b"]))
        return point["a"] - 3 * abs(point["a"] - point["b"])

    start = {"a": 1, "b": 1}
    assert coordinate_search(value, grids, start) == start
    asked.clear()
    found = coordinate_search(value, grids, start, outer="a")
    assert found == {"a": 4, "b": 4}
    assert asked[0] == (1, 1)  # the search begins at the start
    assert (4, 1) not in asked  # and continues where the last one ended


def test_a_start_between_the_candidates():
    near, far = (lambda p: -abs(p["a"] - 3.0)), (lambda p: p["a"])
    for value, best in ((near, 3.0), (far, 10.0)):
        found = coordinate_search(value, {"a": (1.0, 10.0)}, {"a": 3.0, "b": 7})
        assert found == {"a": best, "b": 7}  # b has no grid


def test_the_first_of_equal_points_wins():
    tried = []
    found = coordinate_search(
        lambda p: tried.append(p["x"]) or 0.0, {"x": (1, 2, 3, 4)}, {"x": 2}
    )
    assert found == {"x": 2}
    assert set(tried) == {1, 2, 3}
