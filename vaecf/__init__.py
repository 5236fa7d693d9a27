"""Collaborative filtering with variational autoencoders, in JAX and Flax.

>>> import vaecf
>>> recommender = vaecf.Recommender().fit(frame)       # columns user, item
>>> recommender.recommend({"ann": [12, 50]}, k=10)

Importing this package starts no device and imports nothing heavy; names are
looked up when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vaecf.data.dataset import Dataset as Dataset
    from vaecf.data.dataset import open_dataset as open_dataset
    from vaecf.data.in_memory import load_dataset as load_dataset
    from vaecf.data.in_memory import split as split
    from vaecf.data.interactions import Interactions as Interactions
    from vaecf.errors import VaecfError as VaecfError
    from vaecf.serving.recommender import Recommender as Recommender

_HOME = {
    "Dataset": "vaecf.data.dataset",
    "Interactions": "vaecf.data.interactions",
    "Recommender": "vaecf.serving.recommender",
    "VaecfError": "vaecf.errors",
    "load_dataset": "vaecf.data.in_memory",
    "open_dataset": "vaecf.data.dataset",
    "split": "vaecf.data.in_memory",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module at first use (PEP 562)."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
