"""Turns ratings into a dataset: filters, splits, writes, reports.

    python experiments/prepare_dataset.py --dataset=ml-20m
    python experiments/prepare_dataset.py --dataset=ml-1m \\
        --ratings=ml-1m/ratings.dat --protocol=paper --held_out_users=500
    python experiments/prepare_dataset.py --ratings=shop.csv \\
        --user_column=customer --item_column=sku --output=data/shop
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

from vaecf import cli
from vaecf.data import catalog, dataset, prepare
from vaecf.data.file_settings import FileSettings
from vaecf.reporting import commands

_TEXT, _INT = flags.DEFINE_string, flags.DEFINE_integer
for _name, _define, _help in (
    ("verify", _TEXT, "Only check the files of this dataset."),
    ("dataset", _TEXT, "Known dataset, such as ml-20m, or synthetic."),
    ("ratings", _TEXT, "Ratings: file, folder, or a pattern such as *.csv."),
    ("data_dir", _TEXT, "Folder laid out as the recipe's; default: /data."),
    ("output", _TEXT, "Directory to write; default: data/<name>."),
    ("name", _TEXT, "Name of the data; default: the dataset's or file's."),
    ("cache_dir", _TEXT, "Directory for downloads; default: $VAECF_CACHE."),
    ("protocol", _TEXT, "paper, recipe or vaecf; default: the dataset's."),
    ("held_out_users", _INT, "Validation and test users each; default: 1/10."),
    ("min_items_per_user", _INT, "Items that a user needs; default: 5."),
    ("min_users_per_item", _INT, "Users that an item needs; default: 0."),
    ("seed", _INT, "Seed of the split; default: 98765 for paper, else 0."),
):
    _define(_name, None, _help)
cli.define_settings(FileSettings)
flags.DEFINE_float("fold_in_proportion", 0.8, "Share of held-out items shown.")
flags.DEFINE_bool("iterate_filters", False, "Filter until nothing changes.")
flags.DEFINE_bool("overwrite", False, "Replace an existing dataset.")


def main(argv: Sequence[str]) -> None:
    """Parses the flags, prepares, and suggests the next command."""
    del argv
    if directory := flags.FLAGS["verify"].value:
        dataset.open_dataset(directory, verify=True)
        cli.log(f"{directory}: all files are whole")
        return
    settings = prepare.Settings(**cli.settings_from_flags(prepare.Settings))
    log = lambda line: cli.log(cli.with_flags(line))  # noqa: E731
    made = prepare.prepare(settings, log=log)
    config, test = catalog.config_of(made.name, made.protocol), made.test
    then = {"config.data.dir": made.path, "test": bool(test.held_out.nnz)}
    cli.log(f"next: {commands.training(config, made.name, then)}")


if __name__ == "__main__":
    cli.run(main)
