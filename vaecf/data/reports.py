"""Describes a prepared dataset in lines for a person."""

from __future__ import annotations

from vaecf.data.dataset import Dataset


def describe(dataset: Dataset) -> list[str]:
    """Returns lines with the counts before and after each step.

    Args:
      dataset: as `prepare` returns it.
    """
    constants = dataset.manifest["protocol_constants"]
    source = dataset.manifest["source"]
    origin = f" from {source['file']}" if source else ""
    fold_in = round(100 * (1 - constants["test_proportion"]), 6)
    rows = _steps(dataset) if "rows_read" in _counts(dataset) else []
    rows += _splits(dataset)
    return [
        f"{dataset.name}{origin}: protocol {dataset.protocol}, seed "
        f"{constants['seed']}, {fold_in:g} % of a held-out user's items "
        "folded in",
        *(f"  {name:<12}{n:>12,} {text}" for name, n, text in rows),
        f"written to {dataset.path}",
    ]


def _counts(dataset: Dataset) -> dict[str, int]:
    counts: dict[str, int] = dataset.manifest["counts"]
    return counts


def _steps(dataset: Dataset) -> list[tuple[str, int, str]]:
    """Returns (name, count, explanation) of reading and filtering."""
    counts = _counts(dataset)
    constants = dataset.manifest["protocol_constants"]
    read = "rows"
    if counts["users_read"] is not None:
        users, items = counts["users_read"], counts["items_read"]
        read += f" ({users:,} users, {items:,} items)"
    repeated = "pairs collapsed"
    if dataset.protocol != "vaecf":
        repeated = f"pairs (counted as rows, as {dataset.protocol} does)"
    rounds = chosen = ""
    if constants["iterate_filters"]:
        rounds = f", {counts['filter_rounds']} rounds"
    if constants["held_out_users_by_default"]:
        chosen = " (a tenth, at most 10,000: choose with held_out_users)"
    steps = [("read", counts["rows_read"], read)]
    if counts["blank_rows"]:
        steps.append(("", counts["blank_rows"], "empty lines skipped"))
    if (least := constants["min_rating"]) is not None:
        remaining = counts["rows_read"] - counts["below_min_rating"]
        steps.append((f"rating >= {least:g}", remaining, "rows"))
    return [
        *steps,
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


def _splits(dataset: Dataset) -> list[tuple[str, int, str]]:
    train, counts = dataset.train, _counts(dataset)
    rows = [("train", train.n_users, f"users  {train.nnz:,} interactions")]
    for name in ("validation", "test"):
        fold_in, held_out = dataset.split(name)
        text = f"users  {fold_in.nnz:,} folded in, {held_out.nnz:,} held out"
        rows.append((name, fold_in.n_users, text))
    rows.append(("vocabulary", dataset.n_items, "items"))
    for key, text in (
        (
            "interactions_outside_vocabulary",
            "interactions of held-out users dropped: items that no training "
            "user has",
        ),
        (
            "held_out_users_without_items",
            "held-out users dropped: no item in the vocabulary",
        ),
    ):
        if counts.get(key):
            rows.append(("", counts[key], text))
    return rows
