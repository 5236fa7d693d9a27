"""What each part of a blend contributes, on the test users of finished runs.

    python experiments/benchmark/ablation.py runs/blend runs/blend-1 \\
        --json=ablation.json

The runs differ only in their seed and have a linear branch, as configs/blend.py
does. Nothing is trained again: parts are removed from the trained blends, and
the weights of the remaining parts are tuned again on the validation users.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common
from vaecf import cli
from vaecf.errors import VaecfError

FLAGS = flags.FLAGS
flags.DEFINE_float("ease_l2", 500.0, "λ of the EASE that replaces the branch.")
common.define_json()

WHOLE = "the whole blend"


def main(argv: Sequence[str]) -> None:
    """Evaluates the variants, prints a table and writes the JSON."""
    from vaecf import workdir
    from vaecf.evaluation import significance
    from vaecf.evaluation.evaluator import mean_and_stderr

    paths = [pathlib.Path(run) for run in argv[1:]]
    if not paths:
        raise VaecfError("give the workdirs of finished blends")
    _check(paths)
    values: dict[str, list[np.ndarray]] = {}
    for path in paths:
        for name, value_U in _variants(path, FLAGS.ease_l2).items():
            values.setdefault(name, []).append(value_U)
            cli.log(f"{path}: {name} {np.nanmean(value_U):.4f}")
    real_U = ~np.isnan(values[WHOLE][0])
    mean_U = {k: np.mean(v, axis=0)[real_U] for k, v in values.items()}
    paired = significance.paired(
        {k: v for k, v in mean_U.items() if k != WHOLE}, mean_U[WHOLE]
    )
    rows = [
        {
            "variant": name,
            **mean_and_stderr(np.array([np.nanmean(v) for v in per_seed])),
            "seeds": [float(np.nanmean(value_U)) for value_U in per_seed],
            "against": paired[name]._asdict() if name in paired else None,
        }
        for name, per_seed in values.items()
    ]
    metric = workdir.read_config(paths[0]).eval.best_metric
    cli.log("\n" + _table(metric, rows))
    common.write({"runs": [str(path) for path in paths], "variants": rows})


def _check(paths: Sequence[pathlib.Path]) -> None:
    """Raises VaecfError if the runs differ in more than their seed."""
    from vaecf import config as config_lib
    from vaecf import workdir

    first, *others = (
        {
            **config_lib.flatten(workdir.read_config(path).to_dict()),
            "the dataset": workdir.read_json(path / workdir.DATASET),
        }
        for path in paths
    )
    for path, other in zip(paths[1:], others):
        for key in first.keys() - {"seed", "data.dir"}:
            if other[key] != first[key]:
                raise VaecfError(
                    f"{path} and {paths[0]} differ in {key}: give runs that "
                    "differ only in their seed"
                )


def _table(metric: str, rows: Sequence[dict[str, Any]]) -> str:
    def spread(value: float | None) -> str:
        return "" if value is None else f" ± {value:.4f}"

    cells = []
    for row in rows:
        mean = f"{row['mean']:.4f}{spread(row['stderr'])}"
        against = p = ""
        if other := row["against"]:
            against = f"{other['difference']:+.4f}{spread(other['stderr'])}"
            p = f"{other['p_holm']:.1e}"
        cells.append((row["variant"], mean, against, p))
    head = ("", metric, f"against {WHOLE}", "p (Holm)")
    return common.markdown(head, cells)


def _variants(workdir: pathlib.Path, ease_l2: float) -> dict[str, np.ndarray]:
    """Returns the metric of every test user, float64 [U], by variant."""
    from vaecf.data.dataset import find_dataset
    from vaecf.evaluation import baselines, blend_tuning, scorers
    from vaecf.evaluation.evaluator import Evaluator
    from vaecf.evaluation.scorers import ModelParams
    from vaecf.models import blend
    from vaecf.serving.trained_model import load
    from vaecf.training import linear_branch

    model = load(workdir)
    if model.branch is None:
        raise VaecfError(
            f"{workdir}: config.linear.l2 is 0, so that there is no linear "
            "branch to remove"
        )
    dataset = find_dataset(model.config.data.dir)
    n_items = dataset.n_items
    validation, test = (
        Evaluator.for_split(dataset, s, model.config.eval, model.mesh)
        for s in ("validation", "test")
    )
    test = dataclasses.replace(test, metrics=(test.best_metric,))
    ranker = model.ranker(test.depth)

    def measured(ranker: Any, params: Any) -> np.ndarray:
        values = test(ranker, params).per_user[test.best_metric]
        return np.asarray(values, np.float64)

    def tuned(branch: Any, **grids: Any) -> np.ndarray:
        params = ModelParams(model.params, branch)
        chosen = blend_tuning.search(validation, ranker, params, **grids)
        branch = linear_branch.with_weights(
            branch, gain=chosen["gain"], prior=chosen["prior"]
        )
        return measured(ranker, ModelParams(model.params, branch))

    def alone(scorer: Any, params: Any) -> np.ndarray:
        its_ranker = test.compile(scorer)
        return measured(its_ranker, its_ranker.place(params))

    ease = blend.fit(dataset.train, l2=ease_l2, dropout=0.0, user_exponent=0.0)
    name = model.config.model.name
    of_ease = linear_branch.with_weights(ease, gain=blend.GAIN, prior=0.0)
    item_item = {"item_item": ease["item_item"]}
    return {
        f"{name} alone": measured(ranker, ModelParams(model.params)),
        "EASE alone": alone(baselines.scorer("ease", n_items), item_item),
        "linear branch alone": measured(
            test.compile(scorers.linear_branch(n_items)), model.branch
        ),
        f"{name} and EASE": tuned(of_ease, priors=(0.0,)),
        f"{name} and EASE, prior divided out": tuned(of_ease),
        f"{name} and linear branch": tuned(model.branch, priors=(0.0,)),
        WHOLE: tuned(model.branch),
    }


if __name__ == "__main__":
    cli.run(main, takes_arguments=True)
