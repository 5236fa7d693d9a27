"""Trains runs that differ in seeds and numbers together, in one program.

    python experiments/population.py --config=configs/ml1m.py \\
        --workdir=runs/pop --members='seed=0,1,2' \\
        --members='loss.anneal_cap=0.1,0.2'

Each member gets a directory of its own, which main.py can test. A population
that is interrupted starts anew; only a complete one has a members.csv.
"""

from __future__ import annotations

import contextlib
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from vaecf import cli
from vaecf import config as config_lib

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
    from vaecf.errors import VaecfError
    from vaecf.tuning import population, space

    config = _CONFIG.value
    if _DATA_DIR.value is not None:
        config.data.dir = _DATA_DIR.value
    base = config_lib.from_mapping(config)
    members = space.grid(_MEMBERS.value, base)
    population.check([*members.values()])
    workdir = pathlib.Path(_WORKDIR.value)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lib.locked(workdir))
        workdir_lib.require_no_other(workdir, "population")
        if (workdir / workdir_lib.MEMBERS).exists():
            raise VaecfError(
                f"workdir {workdir} holds a trained population "
                f"({workdir_lib.MEMBERS}): choose another workdir"
            )
        for name in members:
            if (workdir / name / workdir_lib.CHECKPOINTS).exists():
                raise VaecfError(
                    f"workdir {workdir / name} holds a run: remove it, or "
                    "choose another workdir"
                )
            stack.enter_context(workdir_lib.locked(workdir / name))
        rows = _train(members, base, workdir)
        _write_table(rows, workdir / workdir_lib.MEMBERS, base)


def _train(
    members: Mapping[str, config_lib.Config],
    base: config_lib.Config,
    workdir: pathlib.Path,
) -> list[dict[str, Any]]:
    """Returns a row per member, the best member first."""
    from vaecf.data.dataset import find_dataset
    from vaecf.tuning import population

    dataset = find_dataset(base.data.dir)
    cli.log(
        f"training {len(members)} members of {base.title} on {dataset.name}: "
        f"{dataset.train.n_users:,} users, {dataset.n_items:,} items, "
        f"{dataset.train.nnz:,} interactions"
    )
    directories = [workdir / name for name in members]
    results = population.train_runs(
        [*members.values()], directories, dataset, log=cli.log
    )
    rows = []
    for name, directory, result in zip(
        members, directories, results, strict=True
    ):
        value = result.progress.best
        if base.linear.l2 and value is not None and result.error is None:
            value = population.tuned_value(directory, dataset)
        flat = config_lib.flatten(result.config.to_dict())
        rows.append(
            {
                "number": name,
                "params": {key: flat[key] for key in population.VARIED},
                "value": value,
                "best_epoch": result.summary.get("best_epoch", 0),
                "epochs": result.progress.epoch,
                "seconds": round(result.progress.seconds, 3),
                "error": result.error,
            }
        )
    return sorted(rows, key=lambda r: (bool(r["error"]), -(r["value"] or 0)))


def _write_table(
    rows: list[dict[str, Any]], path: pathlib.Path, base: config_lib.Config
) -> None:
    """Writes members.csv and prints the members that were trained."""
    import pandas as pd

    from vaecf import workdir as workdir_lib
    from vaecf.errors import VaecfError
    from vaecf.reporting import tables

    metric = base.eval.best_metric
    params = pd.DataFrame([row.pop("params") for row in rows])
    varied = params.loc[:, params.nunique() > 1]
    frame = pd.DataFrame(rows)
    names = {"number": "member", "value": f"validation/{metric}"}
    frame = frame[["number"]].join(varied).join(frame.drop(columns="number"))
    csv = frame.rename(columns=names).to_csv(index=False)
    workdir_lib.write_bytes(path, csv.encode())
    for row in rows:
        if row["error"] is not None:
            cli.log(f"{row['number']} failed: {row['error']}")
    sound = [{**row, "params": {}} for row in rows if row["error"] is None]
    if not sound:
        raise VaecfError(
            "every member failed, see above: change the settings, and choose "
            "another workdir"
        )
    title = (
        f"{len(sound)} members by validation users; seconds are each one's "
        "share"
    )
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
