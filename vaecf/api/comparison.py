"""`vaecf.compare`: paired comparison of finished runs as a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vaecf.api.run import Run
from vaecf.evaluation import compare as compare_lib
from vaecf.files import user_path

if TYPE_CHECKING:
    import pandas as pd


def compare(
    runs: Sequence[Run | str | os.PathLike[str]],
    *,
    metric: str | None = None,
    reference: str | None = None,
    baselines: bool = True,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compares tested runs user by user, on the same test users.

    Runs that differ only in the seed count as one model.

    >>> config = vaecf.load_config("default", {"model.name": "ease"})
    >>> run = vaecf.train(config, split, folder / "runs" / "ease",
    ...                   baselines=["popularity"])
    >>> table = vaecf.compare([run], metric="ndcg@100", reference="ease")
    >>> sorted(table.index), table.attrs["users"]
    (['ease', 'popularity'], 6)

    Args:
      runs: runs, their workdirs, or files of per-user metrics.
      metric: such as 'ndcg@100'; None takes `config.eval.best_metric` of the
        first run.
      reference: model or run to compare with; None takes the best on the
        validation users.
      baselines: also compare the baselines of the runs.
      resamples, seed: of the bootstrap.

    Returns:
      A row per model, the best mean first; the index is its name, with the
      settings that tell it from others. Columns: 'seeds', 'mean' and 'stderr'
      of the metric (over users, or over seeds if there are several); then, of
      the paired difference to the reference, 'difference', its 'difference
      stderr', 'low' and 'high' (95 % bootstrap interval), 'p' (two-sided
      paired t-test) and 'p (Holm)' (corrected for all comparisons), which are
      NaN for the reference. `attrs` has 'metric', 'reference', 'dataset',
      'protocol' and 'users'.

    Raises:
      VaecfError: the runs cannot be compared; names the run and the reason.
    """
    import pandas as pd

    paths = [r.workdir if isinstance(r, Run) else user_path(r) for r in runs]
    found = compare_lib.compare(
        paths,
        metric=metric,
        reference=reference,
        baselines=baselines,
        resamples=resamples,
        seed=seed,
    )
    columns = {
        "difference": "difference",
        "difference stderr": "stderr",
        "low": "low",
        "high": "high",
        "p": "p",
        "p (Holm)": "p_holm",
    }
    rows = {}
    for name, group in found["groups"].items():
        cell = group["metrics"][found["metric"]]
        paired = found["comparisons"].get(name, {})
        rows[name] = {
            "seeds": group["seeds"],
            "mean": cell["mean"],
            "stderr": cell["stderr"],
            **{column: paired.get(key) for column, key in columns.items()},
        }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame = frame.astype({name: float for name in columns})
    frame.index.name = "model"
    for key in ("metric", "reference", "dataset", "protocol", "users"):
        frame.attrs[key] = found[key]
    return frame.sort_values("mean", ascending=False, kind="stable")
