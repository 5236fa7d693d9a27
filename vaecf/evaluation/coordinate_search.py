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
      start: where to begin; added if it is not among them.
      value: the larger the better; asked again for what it was asked for.
    """
    found = climb_in_turns(
        {"x": grid}, [{"x": 1}], {"x": start}, lambda at: value(at["x"])
    )
    return found["x"]


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
                    if value(choice(at)) >= value(choice(moved)):
                        break
                    at = moved
    return choice(at)


def climb_nested(
    outer: str,
    grids: Mapping[str, Sequence[float]],
    turns: Sequence[Mapping[str, int]],
    start: Mapping[str, float],
    value: Callable[[dict[str, float]], float],
) -> dict[str, float]:
    """Climbs in one key by the best that the others come to with it.

    For keys of which the best values hang together: each value of `outer`
    begins where the one before ended.

    Args:
      outer: the key.
      grids: as of `climb_in_turns`.
      turns: directions of the other keys.
      start: as of `climb_in_turns`.
      value: as of `climb_in_turns`.
    """
    inner = {key: grid for key, grid in grids.items() if key != outer}
    found: dict[float, dict[str, float]] = {}
    latest = {key: start[key] for key in inner}

    def best(x: float) -> float:
        nonlocal latest
        if x not in found:
            latest = found[x] = climb_in_turns(
                inner, turns, latest, lambda c: value({**c, outer: x})
            )
        return value({**found[x], outer: x})

    chosen = climb(grids[outer], start[outer], best)
    return {**found[chosen], outer: chosen}
