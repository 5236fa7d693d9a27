"""Search spaces of sweeps.

A search space is a dict that maps settings to an interval or to choices:

    {
        "optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "model.latent": {"low": 50, "high": 400, "step": 50},
        "model.hidden": {"choices": [(), (600,)]},
    }

An interval contains integers only if its bounds are integers and the setting
is not a float.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vaecf import config as config_lib
from vaecf import config_files
from vaecf.config import Config
from vaecf.errors import VaecfError, did_you_mean

Space = Mapping[str, Mapping[str, Any]]

# Values of trials that differ in these settings cannot be compared.
_FIXED = ("data.dir", "eval.best_metric", "eval.metrics")


def load(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Returns what `get_space()` of a Python file returns.

    Args:
      path: a file, or the name of one in `configs/sweeps/`.

    Raises:
      VaecfError: the file is missing, fails, or does not define `get_space`.
    """
    file = config_files.find(path, folder="sweeps", setting="space")
    return config_files.call(file, "get_space")


def check(space: Space, base: Config) -> None:
    """Checks every key, bound and choice of a search space.

    Raises:
      VaecfError: a key is not a setting or must not vary, a description is
        neither an interval nor choices, or the config refuses a value.
    """
    if not isinstance(space, Mapping) or not space:
        raise VaecfError("space must be a dict with at least one key")
    known = config_lib.settings()
    for key in space:
        if key not in known:
            raise VaecfError(
                f"space: {key!r} is not a known key{did_you_mean(key, known)}"
            )
        if key in _FIXED:
            raise VaecfError(
                f"space: {key} must be the same for all trials, to compare "
                f"them: set config.{key} instead"
            )
    for key, made in distributions(space, base).items():
        for value in space[key].get("choices") or (made.low, made.high):
            try:
                config_lib.replace(base, {key: value})
            except VaecfError as error:
                raise VaecfError(f"space: {error}") from None


def distributions(space: Space, base: Config) -> dict[str, Any]:
    """Returns Optuna's distribution of every key; raises as `check`."""
    current = base.flat()
    return {k: _distribution(k, space[k], current[k]) for k in space}


def _distribution(key: str, description: Any, current: Any) -> Any:
    from optuna import distributions as optuna_lib

    try:
        if set(description) == {"choices"}:
            choices = [*map(_stored, description["choices"])]
            if len(set(map(repr, choices))) < len(choices):
                raise ValueError("a choice is repeated")
            return optuna_lib.CategoricalDistribution(choices)
        bounds = [description["low"], description["high"]]
        # Between 0 and 1, a rate has more values than 0 and 1.
        if not isinstance(current, float) and all(
            isinstance(x, int) for x in (*bounds, description.get("step", 1))
        ):
            return optuna_lib.IntDistribution(**description)
        return optuna_lib.FloatDistribution(**description)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise VaecfError(
            f"space: {key}={description!r} must have low and high, and may "
            f"have log and step; or it must have choices alone ({error})"
        ) from None


def _stored(choice: Any) -> Any:
    """Returns a choice as a study stores it: a scalar, or text."""
    scalar = choice is None or isinstance(choice, bool | int | float | str)
    return choice if scalar else repr(choice)


def values(space: Space, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a trial from the parameters that Optuna stored.

    Optuna stores choices such as tuples as text.
    """
    found = {}
    for key, value in stored.items():
        choices = space.get(key, {}).get("choices", ())
        originals = {repr(_stored(choice)): choice for choice in choices}
        found[key] = originals.get(repr(value), value)
    return found
