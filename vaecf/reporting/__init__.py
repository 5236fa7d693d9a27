"""What a person sees: logs, bars, tables, pictures and the run's page.

Reporting knows plain values only: mappings of names to numbers and strings.
It imports no jax and, but for the error type, nothing else of vaecf. Heavy
libraries (matplotlib, tensorboardX, tqdm) load when first used.
"""

from __future__ import annotations

from vaecf.reporting.progress import Progress
from vaecf.reporting.recipe_log import RecipeLogWriter
from vaecf.reporting.report import write_report
from vaecf.reporting.tables import (
    recommendations_table,
    results_rows,
    results_table,
    to_markdown,
)
from vaecf.reporting.writers import (
    JsonlWriter,
    LoggingWriter,
    MultiWriter,
    StdoutWriter,
    TensorBoardWriter,
    Writer,
    read_records,
)

__all__ = [
    "JsonlWriter",
    "LoggingWriter",
    "MultiWriter",
    "Progress",
    "RecipeLogWriter",
    "StdoutWriter",
    "TensorBoardWriter",
    "Writer",
    "read_records",
    "recommendations_table",
    "results_rows",
    "results_table",
    "to_markdown",
    "write_report",
]
