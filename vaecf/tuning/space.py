"""What a sweep may change: a plain dict, checked before the first trial.

    {
        "optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "model.latent": {"low": 50, "high": 400, "step": 50},
        "model.hidden": {"choices": [(), (600,)]},
    }

A key of the config -> an interval, whole numbers where both bounds are and
the config's value is no fraction, or choices.
"""

from __future__ import annotations

import importlib.util
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.errors import VaecfError, did_you_mean

Space = Mapping[str, Mapping[str, Any]]

_INTERVAL = ("low", "high", "log", "step")
# Values of trials that differ in these do not compare.
_FIXED = ("data.dir", "eval.best_metric", "eval.metrics")


def load(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What `get_space()` of a Python file returns.

    Raises:
      VaecfError: there is no such file, or it cannot be run, or it has no
        `get_space`.
    """
    where = f"--space={path}"
    if not path.is_file():
        raise VaecfError(
            f"{where}: no such file; configs/sweeps/ holds some to start from"
        )
    spec = importlib.util.spec_from_file_location("space", path)
    if spec is None or spec.loader is None:
        raise VaecfError(f"{where}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        space = module.get_space()
    except AttributeError as error:
        if hasattr(module, "get_space"):
            raise VaecfError(f"{where} cannot be run ({error})") from error
        raise VaecfError(f"{where} has no get_space(): write one") from None
    except Exception as error:
        raise VaecfError(
            f"{where} cannot be run ({type(error).__name__}: {error})"
        ) from error
    return space


def check(space: Space, base: Config) -> None:
    """Tries every key, bound and choice on the base config.

    Raises:
      VaecfError: a key that the config does not have, an interval that is
        none, or a value that the config refuses.
    """
    if not isinstance(space, Mapping) or not space:
        raise VaecfError(
            "--space: get_space() must return a dict with at least one key"
        )
    known = config_lib.flatten(base.to_dict())
    for key, description in space.items():
        if key not in known:
            raise VaecfError(
                f"--space: {key!r} is not a key of the config"
                f"{did_you_mean(str(key), known)}"
            )
        if key in _FIXED:
            raise VaecfError(
                f"--space: {key} is the same for all trials, or they would not "
                f"compare: set --config.{key} instead"
            )
        for value in _extremes(key, description, known[key]):
            try:
                config_lib.replace(base, {key: value})
            except VaecfError as error:
                raise VaecfError(f"--space: {error}") from None


def _extremes(key: str, description: Any, current: Any) -> list[Any]:
    """Choices, or both ends of the interval."""
    given = description if isinstance(description, Mapping) else {}
    if "choices" in given:
        return _choices(key, given)
    for name in given:
        if name not in _INTERVAL:
            raise VaecfError(
                f"--space: {key}: {name!r} is unknown: use "
                f"{', '.join(_INTERVAL)}, or choices"
            )
    if "low" not in given or "high" not in given:
        raise VaecfError(
            f"--space: {key} must have low and high, or choices, "
            f"not {description!r}"
        )
    low, high, step = given["low"], given["high"], given.get("step")
    for name in ("low", "high", "step"):
        value = given.get(name)
        if value is not None and not _is_number(value):
            raise VaecfError(
                f"--space: {key}: {name}={value!r} must be a finite number"
            )
    if low > high:
        raise VaecfError(
            f"--space: {key}: low={low!r} is above high={high!r}: exchange them"
        )
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise VaecfError(f"--space: {key}: log={log!r} must be True or False")
    if log and low <= 0:
        raise VaecfError(
            f"--space: {key}: low={low!r} must be above 0 with log=True"
        )
    if step is not None and (log or step <= 0):
        raise VaecfError(
            f"--space: {key}: step={step!r} must be above 0, and is not for "
            "log=True"
        )
    whole = _is_whole(given, current)
    if whole and step is not None and not isinstance(step, int):
        raise VaecfError(
            f"--space: {key}: step={step!r} must be a whole number, as low "
            "and high are"
        )
    return [low, high]


def _choices(key: str, given: Mapping[str, Any]) -> list[Any]:
    choices = given["choices"]
    if others := [name for name in given if name != "choices"]:
        raise VaecfError(
            f"--space: {key} has choices and {', '.join(others)}: give one or "
            "the other"
        )
    if not isinstance(choices, list | tuple) or not choices:
        raise VaecfError(
            f"--space: {key}: choices={choices!r} must be a list of values"
        )
    if len({repr(choice) for choice in choices}) < len(choices):
        raise VaecfError(f"--space: {key}: choices={choices!r} repeats a value")
    return list(choices)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _is_whole(description: Mapping[str, Any], current: Any) -> bool:
    """Between 0 and 1 of a rate lies more than 0 and 1."""
    return not isinstance(current, float) and all(
        isinstance(description[bound], int) for bound in ("low", "high")
    )


def distributions(space: Space, base: Config) -> dict[str, Any]:
    """The space as optuna has it; of one that was checked."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    current = config_lib.flatten(base.to_dict())
    found: dict[str, Any] = {}
    for key, d in space.items():
        if "choices" in d:
            found[key] = CategoricalDistribution([*map(_stored, d["choices"])])
        elif _is_whole(d, current[key]):
            found[key] = IntDistribution(
                d["low"],
                d["high"],
                log=d.get("log", False),
                step=d.get("step") or 1,
            )
        else:
            found[key] = FloatDistribution(
                d["low"], d["high"], log=d.get("log", False), step=d.get("step")
            )
    return found


def _stored(choice: Any) -> Any:
    """A choice as a study stores it: those that it cannot as their text."""
    scalar = choice is None or isinstance(choice, bool | int | float | str)
    return choice if scalar else repr(choice)


def values(space: Space, stored: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's stored parameters as the config has them."""
    meant = {}
    for key, value in stored.items():
        choices = space.get(key, {}).get("choices", ())
        originals = {repr(_stored(choice)): choice for choice in choices}
        meant[key] = originals.get(repr(value), value)
    return meant
