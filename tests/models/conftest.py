"""References that several models' tests compare with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vaecf.data.interactions import Interactions
from vaecf.parallel import memory


def _threefry(key: np.ndarray, row: np.ndarray, column: np.ndarray):
    """First word of Threefry-2x32-20 (Salmon et al. 2011) at (row, column)."""
    words = [np.uint32(k) for k in np.asarray(key)]
    words.append(words[0] ^ words[1] ^ np.uint32(0x1BD11BDA))
    x, y = (np.asarray(c).astype(np.uint32) for c in (row, column))
    with np.errstate(over="ignore"):
        x, y = x + words[0], y + words[1]
        for block in range(5):
            for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
                x = x + y
                y = (y << np.uint32(turn)) | (y >> np.uint32(32 - turn))
                y = y ^ x
            x = x + words[(block + 1) % 3]
            y = y + words[(block + 2) % 3] + np.uint32(block + 1)
    return x


@pytest.fixture(scope="session")
def threefry() -> Callable:
    return _threefry


@pytest.fixture(scope="session")
def interactions() -> Callable[[np.ndarray], Interactions]:
    """Makes Interactions from a dense 0/1 array [users, items]."""

    def make(x: np.ndarray) -> Interactions:
        return Interactions.from_pairs(*np.nonzero(x), *x.shape)[0]

    return make


@pytest.fixture
def free_bytes(monkeypatch) -> Callable[[int], None]:
    """Sets the free memory that fits see."""
    return lambda free: monkeypatch.setattr(
        memory, "host_free_bytes", lambda: free
    )
