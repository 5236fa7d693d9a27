"""Turns ratings into a dataset: filters, splits, writes, reports.

    vaecf prepare --dataset=ml-20m
    vaecf prepare --dataset=ml-1m \\
        --ratings=ml-1m/ratings.dat --protocol=paper --held_out_users=500
    vaecf prepare --ratings=shop.csv \\
        --user_column=customer --item_column=sku --output=data/shop
    vaecf prepare --ratings=log.csv \\
        --protocol=leave_last --time_column=date --output=data/log
    vaecf prepare --dataset=ml-100k --folds=5
    vaecf prepare
    vaecf prepare --verify=data/ml-20m

The last but one is the recipe's: in --data_dir, by default /data, it reads
ml-20m/extracted/ml-20m/ratings.csv and writes ml-20m/preprocessed, unless that
holds a dataset. The last one compares files with their digests.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from vaecf import cli, cli_flags, files
from vaecf.data import catalog, folds, prepare
from vaecf.reporting import commands


def define() -> None:
    """Defines the flags."""
    about = "Only check the files of this dataset."
    flags.DEFINE_string("verify", None, about)
    cli_flags.define_settings(prepare.Settings)


def main(argv: Sequence[str]) -> None:
    """Parses the flags, prepares, and suggests the next command."""
    del argv
    if directory := flags.FLAGS.verify:
        folds.open_all(files.user_path(directory), verify=True)
        cli.log(f"{directory}: all files are whole")
        return
    values = cli_flags.settings_from_flags(prepare.Settings)
    settings = prepare.Settings(**values)
    log = lambda line: cli.log(cli.with_flags(line))  # noqa: E731
    made = prepare.prepare(settings, log=log)
    config, test = catalog.config_of(made.name, made.protocol), made.test
    assert made.path is not None  # it is written
    directory = made.path.parent if settings.folds else made.path
    then = {"config.data.dir": directory, "test": bool(test.held_out.nnz)}
    cli.log(f"next: {commands.training(config, made.name, then)}")
