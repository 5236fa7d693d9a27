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
    from vaecf.api.comparison import compare as compare
    from vaecf.api.run import Run as Run
    from vaecf.api.run import open_run as open_run
    from vaecf.api.run import runs as runs
    from vaecf.api.training import sweep as sweep
    from vaecf.api.training import train as train
    from vaecf.config_files import load_config as load_config
    from vaecf.data.dataset import Dataset as Dataset
    from vaecf.data.dataset import open_dataset as open_dataset
    from vaecf.data.in_memory import load_dataset as load_dataset
    from vaecf.data.in_memory import split as split
    from vaecf.data.interactions import Interactions as Interactions
    from vaecf.errors import VaecfError as VaecfError
    from vaecf.serving.exported import (
        ExportedRecommender as ExportedRecommender,
    )
    from vaecf.serving.exported import load_exported as load_exported
    from vaecf.serving.exporting import export as export
    from vaecf.serving.recommender import Recommender as Recommender
    from vaecf.training.compilation_cache import (
        use_compilation_cache as use_compilation_cache,
    )

_HOME = {
    "Dataset": "vaecf.data.dataset",
    "ExportedRecommender": "vaecf.serving.exported",
    "Interactions": "vaecf.data.interactions",
    "Recommender": "vaecf.serving.recommender",
    "Run": "vaecf.api.run",
    "VaecfError": "vaecf.errors",
    "compare": "vaecf.api.comparison",
    "export": "vaecf.serving.exporting",
    "load_config": "vaecf.config_files",
    "load_dataset": "vaecf.data.in_memory",
    "load_exported": "vaecf.serving.exported",
    "open_dataset": "vaecf.data.dataset",
    "open_run": "vaecf.api.run",
    "runs": "vaecf.api.run",
    "split": "vaecf.data.in_memory",
    "sweep": "vaecf.api.training",
    "train": "vaecf.api.training",
    "use_compilation_cache": "vaecf.training.compilation_cache",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module at first use (PEP 562)."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns what completion offers: the public and the special names."""
    return sorted({*_HOME, *(name for name in globals() if name[:2] == "__")})
