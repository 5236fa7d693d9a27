"""Search for the best point of a grid, for expensive objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def coordinate_search(
    value: Callable[[dict[str, float]], float],
    grids: Mapping[str, Sequence[float]],
    start: Mapping[str, float],
    *,
    directions: Sequence[Mapping[str, int]] | None = None,
    outer: str | None = None,
) -> dict[str, float]:
    """Returns a point at which no step in any direction gives a larger value.

    Moves along each direction for as long as the value increases, first up,
    then down, and repeats until no direction helps. Among points of equal value
    the first one visited wins.

    Args:
      value: objective to maximise. The search asks for some points more than
        once: cache the results.
      grids: ascending candidates by key. A start value that is not among its
        key's candidates is added to them.
      start: the point to start from; keys without a grid stay fixed.
      directions: steps in the grids: {'a': 1, 'b': -1} moves a up and b down
        together. None moves one key at a time, in the order of `grids`.
      outer: a key whose best value depends on the best values of all other
        keys. Each candidate of `outer` is judged by a whole search over the
        other keys, which starts where the previous search ended.
    """
    if outer is not None:
        return _nested_search(value, grids, start, directions, outer)
    axes = {key: sorted({*grid, start[key]}) for key, grid in grids.items()}
    at = {key: axis.index(start[key]) for key, axis in axes.items()}

    def point(place: Mapping[str, int]) -> dict[str, float]:
        return {**start, **{key: axes[key][i] for key, i in place.items()}}

    def climb(step: Mapping[str, int]) -> None:
        nonlocal at
        while True:
            moved = at | {key: at[key] + n for key, n in step.items()}
            if any(not 0 <= moved[key] < len(axes[key]) for key in step):
                return
            if value(point(at)) >= value(point(moved)):
                return
            at = moved

    before: dict[str, int] = {}
    while at != before:
        before = at
        for direction in directions or [{key: 1} for key in grids]:
            climb(direction)
            climb({key: -n for key, n in direction.items()})
    return point(at)


def _nested_search(
    value: Callable[[dict[str, float]], float],
    grids: Mapping[str, Sequence[float]],
    start: Mapping[str, float],
    directions: Sequence[Mapping[str, int]] | None,
    outer: str,
) -> dict[str, float]:
    inner = {key: grid for key, grid in grids.items() if key != outer}
    best: dict[float, dict[str, float]] = {}
    latest = dict(start)

    def best_value(point: Mapping[str, float]) -> float:
        nonlocal latest
        x = point[outer]
        if x not in best:
            latest = best[x] = coordinate_search(
                value, inner, {**latest, outer: x}, directions=directions
            )
        return value(best[x])

    chosen = coordinate_search(best_value, {outer: grids[outer]}, start)
    best_value(chosen)  # not yet searched if the grid has a single point
    return best[chosen[outer]]
