"""Who interacted with what: a binary users x items matrix without values.

Compressed sparse rows: the items of user ``u`` are
``indices[indptr[u]:indptr[u + 1]]``. ``indptr`` is int64, so the number of
interactions may pass 2^31; ``indices`` is int32 and may be a memory map, so
nothing here reads all of it unless its docstring says so.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import scipy.sparse

# Entries looked at together where a pass over all interactions is needed, so
# that temporary arrays stay small beside a memory-mapped matrix.
_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """Binary interactions of ``n_users`` users with ``n_items`` items.

    Attributes:
      indptr: int64 ``[n_users + 1]``, starts at 0 and never falls.
      indices: int32 ``[nnz]``, item indices, ascending and unique within a
        user. May be a ``np.memmap``.
      n_items: number of columns.

    Raises:
      VaecfError: on wrong shapes or dtypes. The order of the indices is only
        looked at by ``check``, which reads all of them.
    """

    indptr: np.ndarray
    indices: np.ndarray
    n_items: int

    def __post_init__(self) -> None:
        """Checks what costs nothing; see ``check`` for the rest."""
        for name, dtype in (("indptr", np.int64), ("indices", np.int32)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray):
                raise VaecfError(
                    f"Interactions.{name} must be a NumPy array, "
                    f"got {type(array).__name__}"
                )
            if array.ndim != 1 or array.dtype != dtype:
                raise VaecfError(
                    f"Interactions.{name} must be 1-d {np.dtype(dtype)}, "
                    f"got {array.ndim}-d {array.dtype}"
                )
        if self.n_items < 0 or self.n_items > np.iinfo(np.int32).max:
            raise VaecfError(
                f"Interactions.n_items must be in [0, 2^31), got {self.n_items}"
            )
        if len(self.indptr) == 0 or self.indptr[0] != 0:
            raise VaecfError("Interactions.indptr must start with 0")
        if self.indptr[-1] != len(self.indices):
            raise VaecfError(
                f"Interactions.indptr ends at {int(self.indptr[-1])} but "
                f"there are {len(self.indices)} indices"
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
        """Shape and size, not the arrays."""
        return (
            f"Interactions({self.n_users:,} users x {self.n_items:,} items, "
            f"{self.nnz:,} interactions)"
        )

    def row(self, user: int) -> np.ndarray:
        """Items of one user: int32 view, ascending.

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
        """The matrix of some users, in the order asked for.

        Args:
          users: a slice (with step 1 the indices are a view, not a copy), or
            an integer array ``[n]`` of row numbers, repeats allowed.

        Raises:
          IndexError: if a row number is out of range.
        """
        if isinstance(users, slice):
            start, stop, step = users.indices(self.n_users)
            if step == 1:
                stop = max(start, stop)
                begin, end = self.indptr[start], self.indptr[stop]
                return Interactions(
                    self.indptr[start : stop + 1] - begin,
                    self.indices[begin:end],
                    self.n_items,
                )
            users = np.arange(start, stop, step)
        rows = np.asarray(users)
        if rows.size == 0:
            rows = rows.astype(np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise IndexError(
                "rows() takes a slice or a 1-d integer array, "
                f"got {rows.ndim}-d {rows.dtype}"
            )
        if rows.size and not (
            -self.n_users <= rows.min() and rows.max() < self.n_users
        ):
            raise IndexError(
                f"row numbers must be in [-{self.n_users}, {self.n_users})"
            )
        rows = np.where(rows < 0, rows + self.n_users, rows)
        counts = self.indptr[rows + 1] - self.indptr[rows]
        indptr = _indptr(counts)
        # Position in the source of every entry wanted: the start of its row
        # plus its rank within the row.
        shift = np.repeat(self.indptr[rows] - indptr[:-1], counts)
        positions = np.arange(indptr[-1]) + shift
        indices = np.asarray(self.indices[positions], dtype=np.int32)
        return Interactions(indptr, indices, self.n_items)

    def item_counts(self) -> np.ndarray:
        """Users per item, int64 ``[n_items]``. Reads all the indices."""
        counts = np.zeros(self.n_items, np.int64)
        for start in range(0, self.nnz, _BLOCK):
            block = self.indices[start : start + _BLOCK]
            counts += np.bincount(block, minlength=self.n_items)
        return counts

    def check(self) -> None:
        """Reads every index and checks the promises of the class.

        Raises:
          VaecfError: naming the first user whose items are out of range,
            repeated or not ascending.
        """
        falls = np.flatnonzero(self.counts < 0)
        if falls.size:
            raise VaecfError(
                f"Interactions.indptr falls after user {int(falls[0])}"
            )
        starts = self.indptr[:-1][self.counts > 0]
        for start in range(0, self.nnz, _BLOCK):
            stop = min(start + _BLOCK, self.nnz)
            # One entry of overlap, so that no neighbouring pair is missed.
            block = np.asarray(self.indices[max(start - 1, 0) : stop])
            first = max(start - 1, 0)
            outside = (block < 0) | (block >= self.n_items)
            if outside.any():
                at = int(np.argmax(outside))
                raise VaecfError(
                    f"user {self._user_of(first + at)} has item index "
                    f"{int(block[at])}, outside [0, {self.n_items})"
                )
            bad = np.diff(block) <= 0
            low, high = np.searchsorted(starts, [first + 1, stop])
            bad[starts[low:high] - first - 1] = False
            if bad.any():
                user = self._user_of(first + 1 + int(np.argmax(bad)))
                raise VaecfError(
                    f"the items of user {user} are not ascending and unique"
                )

    def _user_of(self, position: int) -> int:
        """The user whose row holds entry number ``position``."""
        return int(np.searchsorted(self.indptr, position, side="right")) - 1

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """A float32 ``csr_matrix`` ``[n_users, n_items]`` of ones (a copy)."""
        import scipy.sparse

        return scipy.sparse.csr_matrix(
            (
                np.ones(self.nnz, np.float32),
                np.array(self.indices),
                self.indptr.copy(),
            ),
            shape=(self.n_users, self.n_items),
        )

    @classmethod
    def from_scipy(cls, matrix: Any) -> Interactions:
        """Takes any two-dimensional SciPy sparse matrix or array.

        Args:
          matrix: users x items, any format. Duplicate entries are summed and
            every entry that is then not zero counts as one interaction. Not
            changed.

        Raises:
          VaecfError: if it is not sparse and two-dimensional.
        """
        import scipy.sparse

        if not scipy.sparse.issparse(matrix) or matrix.ndim != 2:
            raise VaecfError(
                "expected a scipy.sparse matrix of users x items, "
                f"got {type(matrix).__name__}"
            )
        csr = matrix.tocsr(copy=True)
        csr.sum_duplicates()
        csr.eliminate_zeros()
        csr.sort_indices()
        return cls(
            csr.indptr.astype(np.int64, copy=False),
            csr.indices.astype(np.int32, copy=False),
            int(csr.shape[1]),
        )

    @classmethod
    def from_pairs(
        cls,
        user: np.ndarray,
        item: np.ndarray,
        n_users: int,
        n_items: int,
    ) -> tuple[Interactions, int]:
        """Builds the matrix from pairs in any order, repeats collapsed.

        Args:
          user: integers ``[n]`` in ``[0, n_users)``.
          item: integers ``[n]`` in ``[0, n_items)``.
          n_users: number of rows.
          n_items: number of columns.

        Returns:
          The matrix, and the number of pairs that repeated an earlier one.

        Raises:
          VaecfError: if the lengths differ or a value is out of range.
        """
        import scipy.sparse

        user, item = np.asarray(user), np.asarray(item)
        if user.shape != item.shape or user.ndim != 1:
            raise VaecfError(
                "user and item must be 1-d and of one length, "
                f"got shapes {user.shape} and {item.shape}"
            )
        for name, values, bound in (
            ("user", user, n_users),
            ("item", item, n_items),
        ):
            if values.size and not (
                int(values.min()) >= 0 and int(values.max()) < bound
            ):
                raise VaecfError(
                    f"{name} indices must be in [0, {bound}), got "
                    f"{int(values.min())} to {int(values.max())}"
                )
        # A counting sort in C: linear, no key wider than an index. int8 keeps
        # the values, which we never read, small.
        ones = np.ones(len(user), np.int8)
        csr = scipy.sparse.coo_matrix(
            (ones, (user, item)), shape=(n_users, n_items)
        ).tocsr()
        csr.sum_duplicates()
        matrix = cls(
            csr.indptr.astype(np.int64, copy=False),
            csr.indices.astype(np.int32, copy=False),
            n_items,
        )
        return matrix, len(user) - matrix.nnz

    @classmethod
    def empty(cls, n_users: int, n_items: int) -> Interactions:
        """``n_users`` users without any interaction."""
        return cls(
            np.zeros(n_users + 1, np.int64), np.zeros(0, np.int32), n_items
        )


def _indptr(counts: np.ndarray) -> np.ndarray:
    """Row starts, int64 ``[n + 1]``, of rows with these counts ``[n]``."""
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr
