"""Choosing numbers by a value that takes long to work out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def climb(
    grid: Sequence[float], start: float, value: Callable[[float], float]
) -> float:
    """Where a neighbour in the grid is no better any more.

    Up first, then down; of equal ones the first tried stays.

    Args:
      grid: ascending.
      start: out of it.
      value: the larger the better.
    """
    at = list(grid).index(start)
    for step in (1, -1):
        while 0 <= at + step < len(grid):
            if value(grid[at + step]) <= value(grid[at]):
                break
            at += step
    return grid[at]


def climb_in_turns(
    grids: Mapping[str, Sequence[float]],
    start: Mapping[str, float],
    value: Callable[[dict[str, float]], float],
) -> dict[str, float]:
    """Climbs one key after the other until none gets better.

    Args:
      grids: ascending values of each key, in the order of the turns. A start
        that is not among them is added.
      start: a value of each key.
      value: of a whole choice; asked again for one that it was asked for.

    Returns:
      The choice that is no worse than its neighbours.
    """
    chosen = dict(start)
    before: dict[str, float] = {}
    while chosen != before:
        before = dict(chosen)
        for key, grid in grids.items():
            chosen[key] = climb(
                sorted({*grid, start[key]}),
                chosen[key],
                lambda x, key=key: value({**chosen, key: x}),  # type: ignore[misc]
            )
    return chosen
