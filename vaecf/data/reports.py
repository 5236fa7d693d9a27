"""Describes a prepared dataset in lines for a person."""

from __future__ import annotations

from vaecf.data.dataset import Dataset
from vaecf.data.readers import notes

_Row = tuple[str, int, str]  # name, count, explanation


def describe(dataset: Dataset) -> list[str]:
    """Returns lines with the counts before and after each step."""
    constants = dataset.manifest["protocol_constants"]
    source = dataset.manifest["source"]
    origin = f" from {source['file']}" if source else ""
    fold_in = round(100 * (1 - constants["test_proportion"]), 6)
    is_generated = "rows_read" not in dataset.manifest["counts"]
    rows = ([] if is_generated else _steps(dataset)) + _splits(dataset)
    return [
        f"{dataset.name}{origin}: protocol {dataset.protocol}, seed "
        f"{constants['seed']}, {fold_in:g} % of a held-out user's items "
        "folded in",
        *(f"  {name:<12}{n:>12,} {text}" for name, n, text in rows),
        f"written to {dataset.path}",
    ]


def _steps(dataset: Dataset) -> list[_Row]:
    counts = dataset.manifest["counts"]
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
    rows = [("read", counts["rows_read"], read)]
    changes = notes(counts | {"below_min_rating": 0})
    rows += [("", n, text) for n, text in changes]
    if (least := constants["min_rating"]) is not None:
        remaining = counts["rows_read"] - counts["below_min_rating"]
        rows.append((f"rating >= {least:g}", remaining, "rows"))
    filtered = (
        f"interactions of {counts['users_after_filters']:,} users with "
        f"{counts['items_after_filters']:,} items (users with at least "
        f"{constants['min_items_per_user']} items, items with at least "
        f"{constants['min_users_per_item']} users{rounds})"
    )
    dropped = (
        f"interactions, {counts['dropped_users']:,} users, "
        f"{counts['dropped_items']:,} items by these filters"
    )
    held_out = f"users for validation and as many for test{chosen}"
    return [
        *rows,
        ("repeated", counts["duplicates_collapsed"], repeated),
        ("filtered", counts["interactions_after_filters"], filtered),
        ("dropped", counts["dropped_interactions"], dropped),
        ("held out", constants["held_out_users"], held_out),
    ]


def _splits(dataset: Dataset) -> list[_Row]:
    train, counts = dataset.train, dataset.manifest["counts"]
    rows = [("train", train.n_users, f"users  {train.nnz:,} interactions")]
    for name in ("validation", "test"):
        fold_in, held_out = dataset.split(name)
        text = f"users  {fold_in.nnz:,} folded in, {held_out.nnz:,} held out"
        rows.append((name, fold_in.n_users, text))
    rows.append(("vocabulary", dataset.n_items, "items"))
    if n := counts.get("interactions_outside_vocabulary"):
        text = "interactions of held-out users dropped: not in the vocabulary"
        rows.append(("", n, text))
    if n := counts.get("held_out_users_without_items"):
        text = "held-out users dropped: no item in the vocabulary"
        rows.append(("", n, text))
    return rows
