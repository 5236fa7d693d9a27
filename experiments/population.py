"""Trains runs that differ in seeds and numbers together, in one program.

    python experiments/population.py --config=configs/ml1m.py \\
        --workdir=runs/pop --members='seed=0,1,2' \\
        --members='loss.anneal_cap=0.1,0.2'

Each member gets a workdir of its own, as main.py --train makes them. The same
command resumes an interrupted population, and further members may be added.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from vaecf import cli
from vaecf import config as config_lib
from vaecf.errors import VaecfError

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(_ROOT))  # configs import each other as configs.<name>
_CONFIG = cli.define_config(_ROOT / "configs" / "ml1m.py")
flags.adopt_module_key_flags(cli)  # for --help
_WORKDIR = flags.DEFINE_string("workdir", None, "The population's directory.")
flags.mark_flag_as_required("workdir")
_MEMBERS = flags.DEFINE_multi_string(
    "members",
    [],
    "A setting and its values, such as seed=0,1,2; several of these flags "
    "give every combination.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "The dataset; the same as --config.data.dir."
)


def main(argv: Sequence[str]) -> None:
    """Trains the members, writes members.csv and prints it."""
    del argv
    from vaecf import workdir as workdir_lib
    from vaecf.data.dataset import find_dataset
    from vaecf.tuning import population

    config = _CONFIG.value
    if _DATA_DIR.value is not None:
        config.data.dir = _DATA_DIR.value
    base = config_lib.from_mapping(config)
    members = grid(_MEMBERS.value, base)
    population.check([*members.values()])
    dataset = find_dataset(base.data.dir)
    workdir = pathlib.Path(_WORKDIR.value)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lib.locked(workdir))
        workdir_lib.require_no_other(workdir, "population")
        for name, own in members.items():
            stack.enter_context(workdir_lib.locked(workdir / name))
            workdir_lib.check_or_create(workdir / name, own, dataset)
        cli.log(
            f"training {len(members)} members of {base.title} on "
            f"{dataset.name}: {dataset.train.n_users:,} users, "
            f"{dataset.n_items:,} items, {dataset.train.nnz:,} interactions"
        )
        rows = _train(members, dataset, workdir)
        _write_table(rows, workdir / workdir_lib.MEMBERS, base)


def grid(
    members: Sequence[str], base: config_lib.Config
) -> dict[str, config_lib.Config]:
    """Returns the config of every combination of values, by a short name.

    Args:
      members: settings and their values: 'seed=0,1', 'loss.gamma=0.01,0.02'.
      base: the settings that all members share.

    Returns:
      {'seed=0,gamma=0.01': config, ...}; the first setting varies slowest.

    Raises:
      VaecfError: a setting is unknown or given twice, or the config refuses a
        value.
    """
    lists = dict[str, list[Any]]()
    for text in members:
        key, _, listed = text.partition("=")
        try:
            found = ast.literal_eval(f"[{listed}]")
        except (SyntaxError, ValueError):
            found = []
        if not found:
            raise VaecfError(
                f"--members={text} must be a setting and its values, such as "
                "'seed=0,1,2'"
            )
        if key in lists:
            raise VaecfError(
                f"--members={text}: {key} is given twice: give all its values "
                "at once"
            )
        lists[key] = found
    if not lists:
        raise VaecfError(
            "--members is missing: give a setting and its values, such as "
            "'seed=0,1,2'"
        )
    configs = {}
    for combination in itertools.product(*lists.values()):
        try:
            config = config_lib.replace(
                base, dict(zip(lists, combination, strict=True))
            )
        except VaecfError as error:
            raise VaecfError(f"--members: {error}") from None
        flat = config_lib.flatten(config.to_dict())
        # No two settings that may vary end in the same word.
        name = ",".join(f"{k.rpartition('.')[2]}={flat[k]}" for k in lists)
        if name in configs:
            raise VaecfError(f"--members: {name} is there twice: remove one")
        configs[name] = config
    return configs


def _train(
    members: Mapping[str, config_lib.Config],
    dataset: Any,
    workdir: pathlib.Path,
) -> list[dict[str, Any]]:
    """Returns a row per member, the best member first."""
    from vaecf import workdir as workdir_lib
    from vaecf.training import loop
    from vaecf.tuning import population

    names, configs = [*members], [*members.values()]
    directories = [workdir / name for name in names]

    def train(m: int, pipeline: Any) -> dict[str, Any]:
        config, directory = configs[m], directories[m]
        flat = config_lib.flatten(config.to_dict())
        params = {key: flat[key] for key in population.VARIED}
        row = {"number": names[m], "params": params, "error": None}
        names_of_figures = ("value", "best_epoch", "epochs", "seconds")
        try:
            result = loop.train(
                config,
                dataset,
                directory,
                # The members advance at about the same speed.
                show_progress=False if m else None,
                pipeline=pipeline,
                log=lambda line: None,
            )
            value = result.progress.best
            if config.linear.l2 and value is not None:
                value = population.tuned_value(directory, dataset)
        except VaecfError as error:
            row["error"] = str(error)
            return row | dict.fromkeys(names_of_figures)
        _write_results(directory / workdir_lib.RESULTS, result.summary)
        figures = {name: result.summary[name] for name in names_of_figures[1:]}
        return row | {"value": value} | figures

    rows = population.train_members(
        configs, directories, dataset, train, log=cli.log
    )
    return sorted(rows, key=lambda r: (bool(r["error"]), -(r["value"] or 0)))


def _write_results(path: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Writes results.json; results of a model with fewer epochs are dropped."""
    from vaecf import workdir as workdir_lib

    results = workdir_lib.read_json(path) if path.exists() else {}
    if results.get("train", {}).get("epochs") != summary["epochs"]:
        (path.parent / workdir_lib.PER_USER).unlink(missing_ok=True)
        workdir_lib.write_json(path, {"train": summary})


def _write_table(
    rows: list[dict[str, Any]], path: pathlib.Path, base: config_lib.Config
) -> None:
    """Writes members.csv and prints the members that were trained."""
    import pandas as pd

    from vaecf import workdir as workdir_lib
    from vaecf.reporting import tables

    metric = base.eval.best_metric
    params = pd.DataFrame([row.pop("params") for row in rows])
    varied = params.loc[:, params.nunique() > 1]
    frame = pd.DataFrame(rows)
    columns = ["value", "best_epoch", "epochs", "seconds", "error"]
    frame = frame[["number"]].join(varied).join(frame[columns])
    names = {"number": "member", "value": f"validation/{metric}"}
    csv = frame.rename(columns=names).to_csv(index=False)
    workdir_lib.write_bytes(path, csv.encode())
    for row in rows:
        if row["error"] is not None:
            cli.log(f"{row['number']} failed: {row['error']}")
    sound = [{**row, "params": {}} for row in rows if row["error"] is None]
    if not sound:
        raise VaecfError(
            "every member failed, see above: change the settings, and choose "
            "another --workdir"
        )
    title = f"{len(sound)} members by validation users"
    table = tables.trials_table(
        sound, metric=metric, title=title, first="member"
    )
    best = shlex.quote(str(path.parent / sound[0]["number"]))
    cli.log(
        f"\n{table}\n\ntable: {path}\n\n"
        f"python experiments/main.py --workdir={best} --test"
    )


if __name__ == "__main__":
    cli.run(main, keep_programs=True)
