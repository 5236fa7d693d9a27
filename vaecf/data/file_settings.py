"""How to read a file: the settings, and the known layouts.

==================== ==========================================================
movielens_csv        ``userId,movieId,rating[,timestamp]`` with a header
movielens_dat        ``user::item::rating::timestamp``
movielens_tab        ``user<TAB>item<TAB>rating<TAB>timestamp`` (ml-100k u.data)
netflix              ``item:`` lines followed by ``user,rating,date`` lines;
                     one file, or a folder of ``combined_data_*.txt`` or
                     ``mv_*.txt``
msd                  ``user<TAB>song<TAB>plays`` (train_triplets.txt)
lightgcn_txt         ``user item item ...``, one user per line; one file, or a
                     folder with ``train.txt`` and ``test.txt``
==================== ==========================================================

"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from vaecf.errors import VaecfError, did_you_mean, short

# Names of a table's columns, or their positions from 0, by ``user``, ``item``,
# ``rating``, ``time`` and ``split``.
Columns = Mapping[str, str | int]


class Dialect(NamedTuple):
    """How a delimited text file without quotes is split into columns."""

    separator: str
    header: bool
    columns: Columns


IN_ORDER = {"user": 0, "item": 1, "rating": 2}
IN_ORDER_WITH_TIME = {**IN_ORDER, "time": 3}
MOVIELENS = {
    "user": "userId",
    "item": "movieId",
    "rating": "rating",
    "time": "timestamp",
}
TEXT_LAYOUTS = {
    "movielens_csv": Dialect(",", True, MOVIELENS),
    "movielens_dat": Dialect("::", False, IN_ORDER_WITH_TIME),
    "movielens_tab": Dialect("\t", False, IN_ORDER_WITH_TIME),
    "msd": Dialect("\t", False, IN_ORDER),
}
LAYOUTS = (*TEXT_LAYOUTS, "netflix", "lightgcn_txt")
# Of the first line, and of all rows.
PATTERNS = {
    "netflix": r"\d+:",
    "movielens_dat": r"\d+::\d+::[\d.]+(::\d+)?",
    "movielens_tab": r"\d+\t\d+\t[\d.]+\t\d+",
    "msd": r"[0-9a-f]{40}\tSO[0-9A-Z]{16}\t\d+",
    "lightgcn_txt": r"\d+( \d+)+ ?",
}
ALPHABETS = {
    "movielens_dat": b"0123456789.:\r\n",
    "movielens_tab": b"0123456789.\t\r\n",
    "msd": b"0123456789abcdefABCDEFGHIJKLMNOPQRSTUVWXYZ\t\r\n",
}
_MISSING_IDS = ("refuse", "drop", "keep")


def setting(meaning: str, default: Any = None) -> Any:
    """Declares a setting that is a flag, too; `meaning` is the flag's help."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSettings:
    """How to read ratings or histories; None recognises it from the file.

    Raises:
      VaecfError: a value is unknown.
    """

    user_column: str | None = setting(
        "Column of the users (user): its name, or with no_header its number "
        "from 1."
    )
    item_column: str | None = setting("Column of the items (item), likewise.")
    rating_column: str | None = setting(
        "Column of the ratings that min_rating is for."
    )
    min_rating: float | None = setting("Lowest rating that counts (any).")
    separator: str | None = setting(
        "What separates the columns of a text table (by the header)."
    )
    no_header: bool = setting(
        "The first line of a text table is a row.", default=False
    )
    quoted: bool | None = setting(
        "A quote at the start of a field opens it (True, but for tables "
        "separated by tabs)."
    )
    encoding: str | None = setting("Encoding of a text (utf-8).")
    comment: str | None = setting(
        "Skip the lines of a text that start with this ('#', above the header)."
    )
    layout: str | None = setting(f"One of {', '.join(LAYOUTS)}.")
    missing_ids: str = setting(
        "What to do with rows whose id is empty, NULL, NaN and the like: "
        "refuse, drop, or keep (but for empty ones).",
        default="refuse",
    )

    def __post_init__(self) -> None:
        hints = _type_hints()
        for field in dataclasses.fields(self):
            if field.name not in hints:
                continue  # of a subclass, which checks its own fields
            value = getattr(self, field.name)
            is_column = field.name.endswith("_column")
            if is_column and isinstance(value, numbers.Number):
                # The number of a column, or a name that pandas made a number.
                object.__setattr__(self, field.name, str(value))
                continue
            kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
            is_number = float in kinds and type(value) is int
            if not (is_number or isinstance(value, kinds)):
                raise VaecfError(
                    f"{field.name}={short(value)} must be of type "
                    f"{kinds[0].__name__}"
                )
        choices = {"layout": LAYOUTS, "missing_ids": _MISSING_IDS}
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise VaecfError(
                    f"{name}={value}{did_you_mean(str(value), known)} (there "
                    f"are {', '.join(known)})"
                )

    @property
    def is_table(self) -> bool:
        """Whether a setting says that a text is a table with columns."""
        return (
            self.user_column is not None
            or self.item_column is not None
            or self.separator is not None
            or self.no_header
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingsSettings(FileSettings):
    """How to read ratings with what some protocols need; see `FileSettings`."""

    time_column: str | None = setting(
        "Column of the times, for the protocols that need them (time): "
        "numbers, or dates in ISO 8601."
    )
    split_column: str | None = setting(
        "Column that says train, validation or test, for protocol given "
        "(split)."
    )


@functools.cache
def _type_hints() -> dict[str, Any]:
    return typing.get_type_hints(RatingsSettings)
