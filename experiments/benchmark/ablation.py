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

from experiments.benchmark import common, tables
from vaecf import cli, workdir
from vaecf.errors import VaecfError

FLAGS = flags.FLAGS
flags.DEFINE_float("ease_l2", 500.0, "λ of the EASE that replaces the branch.")
common.define_json()

WHOLE = "the whole blend"


def main(argv: Sequence[str]) -> None:
    """Evaluates the variants, prints a table and writes the JSON."""
    from vaecf.evaluation import significance
    from vaecf.evaluation.evaluator import mean_and_stderr

    paths = [pathlib.Path(run) for run in argv[1:]]
    if not paths:
        raise VaecfError("give the workdirs of finished blends")
    _require_same_settings(paths)
    values: dict[str, list[np.ndarray]] = {}
    for path in paths:
        for name, value_U in _variants(path).items():
            values.setdefault(name, []).append(value_U)
            cli.log(f"{path}: {name} {np.nanmean(value_U):.4f}")
    real_U = ~np.isnan(values[WHOLE][0])
    mean_U = {k: np.mean(v, axis=0)[real_U] for k, v in values.items()}
    whole_U = mean_U.pop(WHOLE)
    against = significance.paired(mean_U, whole_U)
    rows, cells = [], []
    for name, per_seed in values.items():
        seeds = [float(np.nanmean(value_U)) for value_U in per_seed]
        row = {"variant": name, "seeds": seeds}
        row |= mean_and_stderr(np.array(seeds))
        cells.append([name, _cell(row["mean"], row["stderr"]), "", ""])
        if other := against.get(name):
            row["against"] = other._asdict()
            difference = _cell(other.difference, other.stderr, "+")
            cells[-1][2:] = difference, f"{other.p_holm:.1e}"
        rows.append(row)
    metric = workdir.read_config(paths[0]).eval.best_metric
    titles = ("", metric, f"against {WHOLE}", "p (Holm)")
    cli.log(f"\n{tables.markdown(titles, cells)}")
    common.write_json({"runs": argv[1:], "variants": rows})


def _cell(value: float, stderr: float | None, sign: str = "") -> str:
    spread = "" if stderr is None else f" ± {stderr:.4f}"
    return f"{value:{sign}.4f}{spread}"


def _require_same_settings(paths: Sequence[pathlib.Path]) -> None:
    runs = [
        workdir.read_config(path).flat()
        | {"the dataset": workdir.read_json(path / workdir.DATASET)}
        | {"seed": 0, "data.dir": ""}
        for path in paths
    ]
    for key in runs[0]:
        if any(run[key] != runs[0][key] for run in runs):
            raise VaecfError(f"the runs differ in {key}, not only in the seed")


def _variants(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the metric of every test user, float64 [U], by variant."""
    from vaecf.data.dataset import find_dataset
    from vaecf.evaluation import baselines, blend_tuning, scorers
    from vaecf.evaluation.evaluator import Evaluator
    from vaecf.models import blend
    from vaecf.serving.trained_model import load
    from vaecf.training import linear_branch

    model = load(path)
    if model.branch is None:
        raise VaecfError(f"{path}: no linear branch (config.linear.l2 is 0)")
    dataset = find_dataset(model.config.data.dir)
    n_items = dataset.n_items
    validation, test = (
        Evaluator.for_split(dataset, split, model.config.eval, model.mesh)
        for split in ("validation", "test")
    )
    test = dataclasses.replace(test, metrics=(test.best_metric,))
    ranker = model.ranker(test.depth)

    def measured(ranker: Any, params: Any) -> np.ndarray:
        values_U = test(ranker, params).per_user[test.best_metric]
        return np.asarray(values_U, np.float64)

    def alone(scorer: Any, params: Any) -> np.ndarray:
        ranker = test.compile(scorer)
        return measured(ranker, ranker.place(params))

    def tuned(branch: Any, **grids: Any) -> np.ndarray:
        params = scorers.ModelParams(model.params, branch)
        chosen = blend_tuning.search(validation, ranker, params, **grids)
        weights = {name: chosen[name] for name in ("gain", "prior")}
        branch = linear_branch.with_weights(branch, **weights)
        return measured(ranker, scorers.ModelParams(model.params, branch))

    l2 = FLAGS.ease_l2
    ease = blend.fit(dataset.train, l2=l2, dropout=0.0, user_exponent=0.0)
    ease = linear_branch.with_weights(ease, gain=blend.GAIN, prior=0.0)
    item_item = {"item_item": ease["item_item"]}
    branch_scorer = scorers.linear_branch(n_items)
    name = model.config.model.name
    return {
        f"{name} alone": measured(ranker, scorers.ModelParams(model.params)),
        "EASE alone": alone(baselines.scorer("ease", n_items), item_item),
        "linear branch alone": alone(branch_scorer, model.branch),
        f"{name} and EASE": tuned(ease, priors=(0.0,)),
        f"{name} and EASE, prior divided out": tuned(ease),
        f"{name} and linear branch": tuned(model.branch, priors=(0.0,)),
        WHOLE: tuned(model.branch),
    }


if __name__ == "__main__":
    cli.run(main, takes_arguments=True)
