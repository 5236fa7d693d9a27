"""How settings are declared and checked: rules, types, messages."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from vaecf.errors import VaecfError, did_you_mean, short


class Rule(NamedTuple):
    """A condition on a value, and the end of "the value must be ..."."""

    text: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Rule:
    """Returns the rule that a value is one of some texts."""
    text = f"one of {', '.join(choices)}"
    return Rule(text, choices.__contains__, choices)


POSITIVE = Rule("above 0", lambda x: x > 0)
NOT_NEGATIVE = Rule("at least 0", lambda x: x >= 0)
COUNT = Rule("at least 1", lambda x: x >= 1)
FRACTION = Rule("in [0, 1)", lambda x: 0 <= x < 1)
DEVICES = Rule("-1 or at least 1", lambda x: x == -1 or x >= 1)


def setting(
    default: Any,
    meaning: str,
    rule: Rule | None = None,
    *,
    resumable: bool = False,
    grid: tuple[float, ...] = (),
) -> Any:
    """Declares a setting as a field of a dataclass.

    Args:
      meaning: one sentence.
      resumable: whether it may change when a run is resumed.
      grid: candidates for the tuning of a baseline, ascending; () is never
        tuned.
    """
    about = {"meaning": meaning, "rule": rule, "resumable": resumable}
    return dataclasses.field(default=default, metadata={**about, "grid": grid})


def checked(name: str, field: dataclasses.Field, value: Any) -> Any:
    """Returns the value as the type of the setting, if its rule allows it."""
    value, rule = convert(field.type, value, name), field.metadata["rule"]
    # None stands outside the range of an optional number.
    if rule and value is not None and not rule.holds(value):
        hint = did_you_mean(value, rule.choices) if rule.choices else ""
        raise VaecfError(f"{name}={short(value)} must be {rule.text}{hint}")
    return value


def plain(value: Any) -> Any:
    """Returns scalars and arrays of NumPy as numbers and lists of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def convert(hint: Any, value: Any, where: str) -> Any:
    """Returns the value as the type of a setting; a bool is not an int."""
    value = plain(value)
    if hint == int | None:
        return None if value is None else convert(int, value, where)
    if hint in (tuple[int, ...], tuple[str, ...]):
        kind = hint.__args__[0]
        items = (value,) if isinstance(value, kind) else value
        if not isinstance(items, (tuple, list)):
            raise VaecfError(
                f"{where}={short(value)} must be a tuple of {kind.__name__}"
            )
        return tuple(convert(kind, item, where) for item in items)
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise VaecfError(
            f"{where}={short(value)} must be of type {hint.__name__}"
        )
    if hint is float and not math.isfinite(value):
        raise VaecfError(f"{where}={short(value)} must be finite")
    return value
