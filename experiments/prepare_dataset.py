"""Turns ratings into a dataset: filters, splits, writes, reports.

    python experiments/prepare_dataset.py --dataset=ml-20m
    python experiments/prepare_dataset.py --dataset=ml-1m \\
        --ratings=ml-1m/ratings.dat --protocol=paper --held_out_users=500
    python experiments/prepare_dataset.py --ratings=shop.csv \\
        --user_column=customer --item_column=sku --output=data/shop
    python experiments/prepare_dataset.py --ratings=log.csv \\
        --protocol=leave_last --time_column=date --output=data/log
    python experiments/prepare_dataset.py --dataset=ml-100k --folds=5
    python experiments/prepare_dataset.py
    python experiments/prepare_dataset.py --verify=data/ml-20m

The last but one is the recipe's: in --data_dir, by default /data, it reads
ml-20m/extracted/ml-20m/ratings.csv and writes ml-20m/preprocessed, unless that
holds a dataset. The last one compares files with their digests.
"""

from __future__ import annotations

from vaecf import interrupts

if __name__ == "__main__":
    interrupts.exit_at_once()

from collections.abc import Sequence

from absl import flags

from vaecf import cli, files
from vaecf.data import catalog, folds, prepare
from vaecf.reporting import commands

_VERIFY = flags.DEFINE_string(
    "verify", None, "Only check the files of this dataset."
)
cli.define_settings(prepare.Settings)


def main(argv: Sequence[str]) -> None:
    """Parses the flags, prepares, and suggests the next command."""
    del argv
    if directory := _VERIFY.value:
        folds.open_all(files.user_path(directory), verify=True)
        cli.log(f"{directory}: all files are whole")
        return
    settings = prepare.Settings(**cli.settings_from_flags(prepare.Settings))
    log = lambda line: cli.log(cli.with_flags(line))  # noqa: E731
    made = prepare.prepare(settings, log=log)
    config, test = catalog.config_of(made.name, made.protocol), made.test
    directory = made.path.parent if settings.folds else made.path
    then = {"config.data.dir": directory, "test": bool(test.held_out.nnz)}
    cli.log(f"next: {commands.training(config, made.name, then)}")


if __name__ == "__main__":
    cli.run(main)
