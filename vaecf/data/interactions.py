"""Interactions as a binary users x items matrix in compressed sparse rows.

The items of user ``u`` are ``indices[indptr[u]:indptr[u + 1]]``. ``indptr`` is
int64, so there may be more than 2^31 interactions. ``indices`` is int32 and
may be a memory map: a method reads all of it only if its docstring says so.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import scipy.sparse

# Interactions, or users, per block of a pass over all: temporary arrays stay
# small compared with a memory-mapped matrix.
_BLOCK = 1 << 24
_BLOCK_USERS = 1 << 16
# A matrix may have this many rows and columns, however few entries it has.
_MANY = 10_000_000
_AXES = ("row", "column")
_DAMAGED = "the matrix is damaged:"

_logger = logging.getLogger("vaecf")


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """Binary interactions of ``n_users`` users with ``n_items`` items.

    Raises:
      VaecfError: wrong shapes or dtypes. Only `check`, which reads all
        indices, verifies their order.
    """

    indptr: np.ndarray  # int64 [n_users + 1], from 0, never decreasing
    # int32 [nnz], ascending and unique within a user; may be an `np.memmap`.
    indices: np.ndarray
    n_items: int

    def __post_init__(self) -> None:
        for name, dtype in (("indptr", np.int64), ("indices", np.int32)):
            array = getattr(self, name)
            is_array = isinstance(array, np.ndarray) and array.ndim == 1
            if not is_array or array.dtype != dtype:
                raise VaecfError(
                    f"Interactions.{name} must be a 1-d NumPy array of "
                    f"{np.dtype(dtype)}, got {type(array).__name__} "
                    f"{getattr(array, 'dtype', '')}"
                )
        if not 0 <= self.n_items <= np.iinfo(np.int32).max:
            raise VaecfError(
                f"Interactions.n_items must be in [0, 2^31), got {self.n_items}"
            )
        ends = self.indptr[[0, -1]].tolist() if len(self.indptr) else []
        if ends != [0, len(self.indices)]:
            raise VaecfError(
                f"Interactions.indptr starts and ends at {ends}, it must start "
                f"with 0 and end with {len(self.indices)}, the indices"
            )

    @property
    def n_users(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        """Number of interactions."""
        return len(self.indices)

    @property
    def counts(self) -> np.ndarray:
        """Items per user, int64 ``[n_users]``."""
        return np.diff(self.indptr)

    def __repr__(self) -> str:
        return (
            f"Interactions({self.n_users:,} users x {self.n_items:,} items, "
            f"{self.nnz:,} interactions)"
        )

    def row(self, user: int) -> np.ndarray:
        """Returns the items of one user, an int32 view in ascending order.

        Raises:
          IndexError: if ``user`` is outside ``[-n_users, n_users)``.
        """
        if not -self.n_users <= user < self.n_users:
            raise IndexError(
                f"user {user} is out of range for {self.n_users} users"
            )
        user %= self.n_users
        return self.indices[self.indptr[user] : self.indptr[user + 1]]

    def rows(self, users: slice | np.ndarray) -> Interactions:
        """Returns the matrix of some users, in the given order.

        A slice of step 1 makes a view; integers ``[n]`` may repeat.

        Raises:
          IndexError: a row number is out of range.
        """
        if isinstance(users, slice):
            start, stop, step = users.indices(self.n_users)
            if step == 1:
                indptr = self.indptr[start : max(start, stop) + 1]
                indices = self.indices[indptr[0] : indptr[-1]]
                return Interactions(indptr - indptr[0], indices, self.n_items)
            users = np.arange(start, stop, step)
        # Checks the numbers, and maps negative ones.
        rows = np.arange(self.n_users)[users]
        counts = self.indptr[rows + 1] - self.indptr[rows]
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        # Position of every wanted entry in the source: the start of its row
        # plus its rank within the row.
        shift = np.repeat(self.indptr[rows] - indptr[:-1], counts)
        positions = np.arange(indptr[-1]) + shift
        indices = np.asarray(self.indices[positions], dtype=np.int32)
        return Interactions(indptr, indices, self.n_items)

    def item_counts(self) -> np.ndarray:
        """Returns users per item, int64 ``[n_items]``. Reads all indices."""
        counts = np.zeros(self.n_items, np.int64)
        for start in range(0, self.nnz, _BLOCK):
            block = self.indices[start : start + _BLOCK]
            counts += np.bincount(block, minlength=self.n_items)
        return counts

    def check(self) -> None:
        """Checks that rows are ascending, unique and in range. Reads all.

        Raises:
          VaecfError: names the first user whose row is wrong.
        """
        falls = np.flatnonzero(self.counts < 0)
        if falls.size:
            raise VaecfError(
                f"Interactions.indptr decreases after user {int(falls[0])}"
            )
        for first in range(0, self.n_users, _BLOCK_USERS):
            part = self.rows(slice(first, first + _BLOCK_USERS))
            indices, starts = part.indices, part.indptr[1:-1]
            low, high = indices.min(initial=0), indices.max(initial=-1)
            descends = np.diff(indices) <= 0
            # A row may start with any item.
            descends[starts[(starts > 0) & (starts < part.nnz)] - 1] = False
            if low >= 0 and high < self.n_items and not descends.any():
                continue
            outside = (indices < 0) | (indices >= self.n_items)
            at = int(np.argmax(outside if outside.any() else descends))
            user = first + int(np.searchsorted(part.indptr, at, "right")) - 1
            if outside.any():
                raise VaecfError(
                    f"user {user} has item index {indices[at]}, outside "
                    f"[0, {self.n_items})"
                )
            raise VaecfError(
                f"the items of user {user} are not ascending and unique"
            )

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """Returns a float32 ``csr_matrix`` of ones (a copy)."""
        import scipy.sparse

        values = np.ones(self.nnz, np.float32)
        return scipy.sparse.csr_matrix(
            (values, np.array(self.indices), self.indptr.copy()),
            shape=(self.n_users, self.n_items),
        )

    @classmethod
    def from_scipy(cls, matrix: Any) -> Interactions:
        """Converts a two-dimensional SciPy sparse matrix or array.

        Every entry other than 0 is an interaction, see `nonzero`.

        Raises:
          VaecfError: see `entries`.
        """
        row, column = entries(matrix)
        return cls.from_pairs(row, column, *matrix.shape)[0]

    @classmethod
    def from_pairs(
        cls, user: np.ndarray, item: np.ndarray, n_users: int, n_items: int
    ) -> tuple[Interactions, int]:
        """Builds the matrix from pairs ``[n]`` in any order; repeats collapse.

        Returns:
          The matrix, and the number of pairs that repeated an earlier one.

        Raises:
          VaecfError: the lengths differ, or a value is out of range.
        """
        import scipy.sparse

        user, item = np.asarray(user), np.asarray(item)
        if user.shape != item.shape or user.ndim != 1:
            raise VaecfError(
                "user and item must be 1-d and of one length, "
                f"got shapes {user.shape} and {item.shape}"
            )
        bounds = ("user", user, n_users), ("item", item, n_items)
        for name, values, bound in bounds:
            low, high = values.min(initial=0), values.max(initial=-1)
            if low < 0 or high >= bound:
                raise VaecfError(
                    f"{name} indices must be in [0, {bound}), got {low} to "
                    f"{high}"
                )
        # SciPy's conversion is a counting sort: linear, and without keys wider
        # than an index. int8 keeps the values, which nobody reads, small.
        csr = scipy.sparse.coo_matrix(
            (np.ones(len(user), np.int8), (user, item)),
            shape=(n_users, n_items),
        ).tocsr()
        csr.sum_duplicates()
        matrix = cls(
            csr.indptr.astype(np.int64, copy=False),
            csr.indices.astype(np.int32, copy=False),
            n_items,
        )
        return matrix, len(user) - csr.nnz


class HeldOut(NamedTuple):
    """Users with held-out interactions, row for row in both matrices."""

    fold_in: Interactions  # the items that a model sees of each user
    held_out: Interactions  # the items to predict; possibly none for a user


def entries(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns (row, column) of every entry of a SciPy matrix that is not 0.

    Raises:
      VaecfError: no two-dimensional sparse matrix; or see `nonzero`.
    """
    import scipy.sparse

    if not scipy.sparse.issparse(matrix) or matrix.ndim != 2:
        raise VaecfError(
            "expected a scipy.sparse matrix of users x items, "
            f"got {type(matrix).__name__}"
        )
    if matrix.format in ("csr", "csc"):
        places = matrix.indptr, matrix.indices
        return nonzero(matrix.format, matrix.shape, matrix.data, *places)
    try:
        coo = matrix.tocoo()
    except (ValueError, IndexError) as error:
        raise VaecfError(f"{_DAMAGED} {error}") from None
    return nonzero("coo", matrix.shape, coo.data, coo.row, coo.col)


def nonzero(
    kind: str,
    shape: tuple[int, int],
    value: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (row, column) of every entry that is not 0, from raw arrays.

    An entry that is stored twice is returned twice: values are never summed,
    so that many clicks cannot overflow or cancel out. Negative entries are
    interactions like all others, with a warning. SciPy's own functions write
    outside their arrays if the indices are out of range.

    Args:
      kind: 'csr', 'csc' or 'coo'.
      first: indptr, or the rows of 'coo'.
      second: indices, or the columns of 'coo'.

    Raises:
      VaecfError: arrays that do not fit, an index out of range, an entry that
        is not a finite number, or far more rows or columns than entries.
    """
    for array in (first, second):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise VaecfError(f"{_DAMAGED} its indices are not integers")
    row, column = first, second
    if kind != "coo":
        n_major = shape[0 if kind == "csr" else 1]
        if (
            len(first) != n_major + 1
            or first[0] != 0
            or (first[1:] < first[:-1]).any()
            or first[-1] > min(len(second), len(value))
        ):
            raise VaecfError(
                f"{_DAMAGED} indptr must have {n_major + 1} entries, start "
                f"with 0, never decrease, and end with at most {len(second)}"
            )
        counts = (first[1:] - first[:-1]).astype(np.int64)
        major = np.repeat(np.arange(n_major), counts)
        minor, value = second[: len(major)], value[: len(major)]
        row, column = (major, minor) if kind == "csr" else (minor, major)
    if not row.shape == column.shape == value.shape:
        raise VaecfError(f"{_DAMAGED} its arrays have different lengths")
    for indices, name, size in zip((row, column), _AXES, shape):
        low, high = indices.min(initial=0), indices.max(initial=0)
        if low < 0 or (high >= size and len(indices)):
            raise VaecfError(
                f"{_DAMAGED} it has {size} {name}s and an entry in {name} "
                f"{low if low < 0 else high}"
            )
        if not 0 <= size <= max(_MANY, 100 * len(row)):
            raise VaecfError(
                f"the matrix has {size:,} {name}s and {len(row):,} entries: "
                f"number its {name}s from 0, or pass a DataFrame of ids"
            )
    if value.dtype.kind not in "biuf":
        raise VaecfError(
            f"the matrix has entries of type {value.dtype}: convert it, such "
            "as with matrix.astype(float)"
        )
    if not (finite := np.isfinite(value)).all():
        at = int(np.argmin(finite))
        raise VaecfError(
            f"the matrix holds {value[at]} in row {row[at]}, column "
            f"{column[at]}: an entry is a number, or not there"
        )
    if negative := int((value < 0).sum()):
        _logger.warning(
            "the matrix has %d negative entries, which are interactions like "
            "all entries other than 0: remove them if they mean dislikes",
            negative,
        )
    there = value != 0
    return row[there], column[there]
