"""Describes a prepared dataset in lines for a person."""

from __future__ import annotations

from vaecf.data.dataset import Dataset
from vaecf.data.interactions import HeldOut


def describe(dataset: Dataset) -> list[str]:
    """Returns lines with the counts before and after each step.

    Args:
      dataset: as `prepare` returns it.
    """
    counts = dataset.manifest["counts"]
    lines = [_title(dataset), *_steps(dataset)]

    def add(name: str, n: int, text: str) -> None:
        lines.append(f"  {name:<12}{n:>12,} {text}")

    def add_held_out(name: str, split: HeldOut) -> None:
        folded, held = split.fold_in.nnz, split.held_out.nnz
        text = f"users  {folded:,} folded in, {held:,} held out"
        add(name, split.fold_in.n_users, text)

    train = dataset.train
    add("train", train.n_users, f"users  {train.nnz:,} interactions")
    add_held_out("validation", dataset.validation)
    add_held_out("test", dataset.test)
    add("vocabulary", dataset.n_items, "items")
    if n := counts.get("interactions_outside_vocabulary"):
        add("", n, "interactions of held-out users dropped: items that no "
            "training user has")  # fmt: skip
    if n := counts.get("held_out_users_without_items"):
        add("", n, "held-out users dropped: no item in the vocabulary")
    lines.append(f"written to {dataset.path}")
    return lines


def _title(dataset: Dataset) -> str:
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
    """Returns the counts after reading and after each filter."""
    counts = dataset.manifest["counts"]
    constants = dataset.manifest["protocol_constants"]
    if "rows_read" not in counts:
        return []
    read = "rows"
    if counts["users_read"] is not None:
        read += (
            f" ({counts['users_read']:,} users, {counts['items_read']:,} items)"
        )
    steps = [("read", counts["rows_read"], read)]
    if counts["blank_rows"]:
        steps.append(("", counts["blank_rows"], "empty lines skipped"))
    if constants["min_rating"] is not None:
        remaining = counts["rows_read"] - counts["below_min_rating"]
        steps.append(
            (f"rating >= {constants['min_rating']:g}", remaining, "rows")
        )
    repeated = "pairs collapsed"
    if dataset.protocol != "vaecf":
        repeated = f"pairs (counted as rows, as {dataset.protocol} does)"
    rounds = ""
    if constants["iterate_filters"]:
        rounds = f", {counts['filter_rounds']} rounds"
    chosen = ""
    if constants["held_out_users_by_default"]:
        chosen = " (a tenth, at most 10,000: choose with held_out_users)"
    steps += [
        ("repeated", counts["duplicates_collapsed"], repeated),
        (
            "filtered",
            counts["interactions_after_filters"],
            f"interactions of {counts['users_after_filters']:,} users with "
            f"{counts['items_after_filters']:,} items (users with at least "
            f"{constants['min_items_per_user']} items, items with at least "
            f"{constants['min_users_per_item']} users{rounds})",
        ),
        (
            "dropped",
            counts["dropped_interactions"],
            f"interactions, {counts['dropped_users']:,} users, "
            f"{counts['dropped_items']:,} items by these filters",
        ),
        (
            "held out",
            constants["held_out_users"],
            f"users for validation and as many for test{chosen}",
        ),
    ]
    return [f"  {name:<12}{n:>12,} {text}" for name, n, text in steps]
