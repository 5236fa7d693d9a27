"""What preparation has done, for a person to read."""

from __future__ import annotations

import pathlib

from vaecf.data import catalog
from vaecf.data.dataset import Dataset


def describe(dataset: Dataset) -> list[str]:
    """Lines on counts before and after each step, the split, what is next.

    Args:
      dataset: as ``prepare`` writes it.
    """
    counts = dataset.manifest["counts"]
    lines = [_title(dataset), *_steps(dataset)]
    train, (fold_in, held_out) = dataset.train, dataset.validation
    rows = [
        ("train", train.n_users, f"{train.nnz:,} interactions"),
        (
            "validation",
            fold_in.n_users,
            f"{fold_in.nnz:,} folded in, {held_out.nnz:,} held out",
        ),
    ]
    fold_in, held_out = dataset.test
    rows.append(
        (
            "test",
            fold_in.n_users,
            f"{fold_in.nnz:,} folded in, {held_out.nnz:,} held out",
        )
    )
    for name, users, text in rows:
        lines.append(f"  {name:<12}{users:>12,} users  {text}")
    lines.append(f"  {'vocabulary':<12}{dataset.n_items:>12,} items")
    for key, text in (
        (
            "interactions_outside_vocabulary",
            "interactions of held-out users left out: items that no training "
            "user has",
        ),
        (
            "held_out_users_without_items",
            "held-out users left out: nothing of theirs is in the vocabulary",
        ),
    ):
        if counts.get(key):
            lines.append(f"  {'':<12}{counts[key]:>12,} {text}")
    lines.append(f"written to {dataset.path}")
    lines.append(f"next: {next_command(dataset)}")
    return lines


def next_command(dataset: Dataset) -> str:
    """The command that trains on a dataset."""
    path = pathlib.Path(dataset.path or "DIR")
    if dataset.name == "ml-20m" and dataset.protocol == "recipe":
        root = path
        if path.parts[-2:] == ("ml-20m", "preprocessed"):
            root = path.parent.parent
        return (
            "python experiments/main.py --train --test "
            f"--data_dir={root} --checkpoint_dir=./checkpoints"
        )
    entry = catalog.CATALOG.get(dataset.name)
    # Most data of one's own is small: settings for large data overfit it.
    config = entry.config if entry else "ml1m"
    test = " --test" if dataset.test.held_out.nnz else ""
    return (
        f"python experiments/main.py --config=configs/{config}.py "
        f"--config.data.dir={path} --workdir=runs/{dataset.name} --train{test}"
    )


def _title(dataset: Dataset) -> str:
    """One line: the data, where from, how split."""
    constants = dataset.manifest["protocol_constants"]
    source = dataset.manifest["source"]
    origin = f" from {source['file']}" if source else ""
    fold_in = round(100 * (1 - constants["test_proportion"]), 6)
    return (
        f"{dataset.name}{origin}: protocol {dataset.protocol}, seed "
        f"{constants['seed']}, {fold_in:g} % of a held-out user's items "
        "folded in"
    )


def _steps(dataset: Dataset) -> list[str]:
    """Counts after reading and after each filter."""
    counts = dataset.manifest["counts"]
    constants = dataset.manifest["protocol_constants"]
    if "rows_read" not in counts:
        return []
    ids = ""
    if counts["users_read"] is not None:
        ids = (
            f" ({counts['users_read']:,} users, {counts['items_read']:,} items)"
        )
    steps = [("read", counts["rows_read"], f"rows{ids}")]
    if counts["blank_rows"]:
        steps.append(("", counts["blank_rows"], "empty lines left out"))
    if constants["min_rating"] is not None:
        remaining = counts["rows_read"] - counts["below_min_rating"]
        steps.append(
            (f"rating >= {constants['min_rating']:g}", remaining, "rows")
        )
    collapsed = dataset.protocol == "vaecf"
    steps.append(
        (
            "repeated",
            counts["duplicates_collapsed"],
            "pairs collapsed"
            if collapsed
            else f"pairs (counted as rows, as {dataset.protocol} does)",
        )
    )
    rounds = counts["filter_rounds"]
    steps.append(
        (
            "filtered",
            counts["interactions_after_filters"],
            f"interactions of {counts['users_after_filters']:,} users with "
            f"{counts['items_after_filters']:,} items (users with at least "
            f"{constants['min_items_per_user']} items, items with at least "
            f"{constants['min_users_per_item']} users"
            + (f", {rounds} rounds)" if constants["iterate_filters"] else ")"),
        )
    )
    steps.append(
        (
            "dropped",
            counts["dropped_interactions"],
            f"interactions, {counts['dropped_users']:,} users, "
            f"{counts['dropped_items']:,} items by these filters",
        )
    )
    steps.append(
        (
            "held out",
            constants["held_out_users"],
            "users for validation and as many for test"
            + (
                " (a tenth, at most 10,000: choose with --held_out_users)"
                if constants["held_out_users_by_default"]
                else ""
            ),
        )
    )
    return [f"  {name:<12}{n:>12,} {text}" for name, n, text in steps]
