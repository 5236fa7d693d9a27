"""What each part of a blend brings, on the test users of finished runs.

    python experiments/benchmark/ablation.py runs/blend runs/blend-1 \\
        --json=ablation.json

The runs differ in their seed alone and have a linear branch, as of
configs/blend.py. Nothing is trained again: parts are taken away from what was
trained, and what remains is weighed anew on the validation users.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from vaecf import cli
from vaecf.errors import VaecfError

_L2 = flags.DEFINE_float("ease_l2", 500.0, "λ of EASE in its place.")
_JSON = flags.DEFINE_string("json", None, "Also write all numbers there.")

ALL = "all of it"


def main(argv: Sequence[str]) -> None:
    """One table, and the numbers as JSON."""
    from vaecf import workdir as workdir_lib
    from vaecf.evaluation import significance

    paths = [pathlib.Path(run) for run in argv[1:]]
    if not paths:
        raise VaecfError("give the workdirs of finished blends")
    _check(paths)
    values: dict[str, list[np.ndarray]] = {}
    for path in paths:
        for name, value_U in _variants(path, _L2.value).items():
            values.setdefault(name, []).append(value_U)
            cli.log(f"{path}: {name} {np.nanmean(value_U):.4f}")
    real_U = ~np.isnan(values[ALL][0])
    mean_U = {k: np.mean(v, axis=0)[real_U] for k, v in values.items()}
    paired = significance.paired(
        {k: v for k, v in mean_U.items() if k != ALL}, mean_U[ALL]
    )
    rows = []
    for name, seeds in values.items():
        means = [float(np.nanmean(v)) for v in seeds]
        spread = (
            float(np.std(means, ddof=1) / len(means) ** 0.5)
            if len(means) > 1
            else None
        )
        row: dict[str, Any] = {
            "variant": name,
            "mean": float(np.mean(means)),
            "stderr": spread,
            "seeds": means,
        }
        if name in paired:
            row["against_all"] = paired[name]._asdict()
        rows.append(row)
    metric = workdir_lib.read_config(paths[0]).eval.best_metric
    cli.log("\n" + _table(metric, rows))
    if _JSON.value:
        runs = [str(path) for path in paths]
        workdir_lib.write_json(
            pathlib.Path(_JSON.value), {"runs": runs, "variants": rows}
        )


def _check(paths: Sequence[pathlib.Path]) -> None:
    """Refuses runs that differ in more than their seed.

    Raises:
      VaecfError: names what differs.
    """
    from vaecf import config as config_lib
    from vaecf import workdir as workdir_lib

    first, *others = (
        {
            **config_lib.flatten(workdir_lib.read_config(path).to_dict()),
            "the dataset": workdir_lib.read_json(path / workdir_lib.DATASET),
        }
        for path in paths
    )
    for path, other in zip(paths[1:], others):
        for key in first.keys() - {"seed", "data.dir"}:
            if other[key] != first[key]:
                raise VaecfError(
                    f"{path} and {paths[0]} differ in {key}: give runs that "
                    "differ in their seed alone"
                )


def _table(metric: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"| | {metric} | against all of it | p (Holm) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        spread = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        against = p = ""
        if (other := row.get("against_all")) is not None:
            against = f"{other['difference']:+.4f} ± {other['stderr']:.4f}"
            p = f"{other['p_holm']:.1e}"
        mean = f"{row['mean']:.4f}{spread}"
        lines.append(f"| {row['variant']} | {mean} | {against} | {p} |")
    return "\n".join(lines)


def _variants(workdir: pathlib.Path, ease_l2: float) -> dict[str, np.ndarray]:
    """The metric of every test user, float64 [U], by what ranks."""
    from vaecf.data.dataset import find_dataset
    from vaecf.evaluation import blend_tuning, scorers
    from vaecf.evaluation.evaluator import Evaluator
    from vaecf.evaluation.scorers import ModelParams
    from vaecf.models import blend
    from vaecf.serving.trained_model import load
    from vaecf.training import linear_branch

    model = load(workdir)
    if model.branch is None:
        raise VaecfError(
            f"{workdir}: config.linear.l2 is 0: there is nothing to take away"
        )
    dataset = find_dataset(model.config.data.dir)
    n_items = dataset.n_items
    validation, test = (
        Evaluator.for_split(dataset, s, model.config.eval, model.setup.mesh)
        for s in ("validation", "test")
    )
    ranker = model.ranker(test.depth)

    def measured(ranker: Any, params: Any) -> np.ndarray:
        result = test(ranker, params)
        assert result is not None
        values = result.per_user[test.best_metric]
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
        "EASE alone": alone(scorers.item_item(n_items), item_item),
        "linear branch alone": measured(
            test.compile(scorers.linear_branch(n_items)), model.branch
        ),
        f"{name} and EASE": tuned(of_ease, priors=(0.0,)),
        f"{name} and EASE, prior divided out": tuned(of_ease),
        f"{name} and linear branch": tuned(model.branch, priors=(0.0,)),
        ALL: tuned(model.branch),
    }


if __name__ == "__main__":
    cli.run(main, takes_arguments=True)
