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
    turns: Sequence[Mapping[str, int]],
    start: Mapping[str, float],
    value: Callable[[dict[str, float]], float],
) -> dict[str, float]:
    """Climbs in one direction after the other until none gets better.

    Args:
      grids: ascending values of each key. A start that is not among them is
        added.
      turns: directions, steps in the grids: {'a': 1, 'b': -1} moves a up while
        it moves b down, and the other way round.
      start: a value of each key.
      value: of a whole choice; asked again for one that it was asked for.

    Returns:
      A choice that is no worse than its neighbours in all directions.
    """
    axes = {key: sorted({*grid, start[key]}) for key, grid in grids.items()}
    at = {key: axis.index(start[key]) for key, axis in axes.items()}

    def choice(place: Mapping[str, int]) -> dict[str, float]:
        return {key: axes[key][i] for key, i in place.items()}

    before: dict[str, int] = {}
    while at != before:
        before = at
        for turn in turns:
            for sign in (1, -1):
                while True:
                    moved = at | {k: at[k] + sign * n for k, n in turn.items()}
                    if any(not 0 <= moved[k] < len(axes[k]) for k in turn):
                        break
                    if value(choice(moved)) <= value(choice(at)):
                        break
                    at = moved
    return choice(at)
