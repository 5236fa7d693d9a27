"""Describes a prepared dataset in lines for a person."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vaecf.data import known_users
from vaecf.data.dataset import Dataset
from vaecf.data.readers import notes

_Row = tuple[str, int, str]  # name, count, explanation


def describe(datasets: Sequence[Dataset], directory: pathlib.Path) -> list[str]:
    """Returns lines with the counts before and after each step.

    Args:
      datasets: the dataset, or its folds, written to `directory`.
    """
    dataset, protocol = datasets[0], datasets[0].protocol
    if is_folds := len(datasets) > 1:
        protocol = f"vaecf, {len(datasets)} folds"
    constants = dataset.manifest["protocol_constants"]
    source = dataset.manifest["source"]
    origin = f" from {source['file']}" if source else ""
    is_generated = "rows_read" not in dataset.manifest["counts"]
    rows = [] if is_generated else _steps(dataset)
    rows += _folds(datasets) if is_folds else _splits(dataset)
    return [
        f"{dataset.name}{origin}: protocol {protocol}, seed "
        f"{constants['seed']}, {_rule(protocol, constants)}",
        *(f"  {name:<12}{n:>12,} {text}" for name, n, text in rows),
        f"written to {directory}",
    ]


def _rule(protocol: str, constants: Mapping[str, Any]) -> str:
    """Says in words which interactions are held out."""
    if protocol not in known_users.PROTOCOLS:
        return (
            f"{_percent(1 - constants['test_proportion'])} of a held-out "
            "user's items folded in"
        )
    n = constants.get("test_items", 1)
    test = {
        "weak": lambda: (
            f"{_percent(constants['test_share'])} of every user's "
            "interactions at random"
        ),
        "leave_last": lambda: (
            "the last interaction of every user"
            if n == 1
            else f"the last {n} interactions of every user"
        ),
        "temporal": lambda: f"everything from {constants['test_time']} on",
        "given": lambda: "as given",
    }[protocol]()
    if "validation_users" not in constants:
        return f"test: {test}; validation: as given"
    if protocol == "leave_last":
        taken = "the last before it" if n == 1 else f"the {n} before them"
    else:
        last = "the last " if protocol == "temporal" else ""
        taken = f"{last}{_percent(constants['test_proportion'])}"
    users = f"{constants['validation_users']:,} users"
    return f"test: {test}; validation: {taken} of {users}"


def _percent(share: float) -> str:
    return f"{round(100 * share, 6):g} %"


def _steps(dataset: Dataset) -> list[_Row]:
    counts = dataset.manifest["counts"]
    constants = dataset.manifest["protocol_constants"]
    read = "rows"
    if counts["users_read"] is not None:
        users, items = counts["users_read"], counts["items_read"]
        read += f" ({users:,} users, {items:,} items)"
    repeated = "pairs collapsed"
    if dataset.protocol in ("paper", "recipe"):
        repeated = f"pairs (counted as rows, as {dataset.protocol} does)"
    rounds = chosen = ""
    if constants["iterate_filters"]:
        rounds = f", {counts['filter_rounds']} rounds"
    if constants.get("held_out_users_by_default"):
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
    rows += [
        ("repeated", counts["duplicates_collapsed"], repeated),
        ("filtered", counts["interactions_after_filters"], filtered),
        ("dropped", counts["dropped_interactions"], dropped),
    ]
    if (n := constants.get("held_out_users")) is not None:
        is_fold = "fold" in constants
        also = "of each fold" if is_fold else "and as many for test"
        held_out = f"users for validation {also}{chosen}"
        rows.append(("held out", n, held_out))
    return rows


def _splits(dataset: Dataset) -> list[_Row]:
    train, counts = dataset.train, dataset.manifest["counts"]
    rows = [("train", train.n_users, f"users  {train.nnz:,} interactions")]
    for name in ("validation", "test"):
        fold_in, held_out = dataset.split(name)
        text = f"users  {fold_in.nnz:,} folded in, {held_out.nnz:,} held out"
        rows.append((name, fold_in.n_users, text))
    outside = "interactions of held-out users"
    if n := counts.get("interactions_before_test"):
        outside = "test interactions"
        text = "interactions: training and validation together"
        rows.append(("before test", n, text))
    rows.append(("vocabulary", dataset.n_items, "items"))
    dropped = {
        "interactions_outside_vocabulary": f"{outside} dropped: not in the "
        "vocabulary",
        "interactions_without_history": "test interactions of "
        f"{counts.get('test_users_without_history', 0):,} users dropped: "
        "these users have no interactions before",
        "held_out_users_without_items": "held-out users dropped: no item in "
        "the vocabulary",
        "users_without_test": "training users without test interactions",
        "validation_moved_to_train": "validation interactions moved to the "
        "training: their users have no other",
        "pairs_in_several_parts": "pairs in several parts: kept in the "
        "earliest",
    }
    for key, text in dropped.items():
        if n := counts.get(key):
            rows.append(("", n, text))
    return rows


def _folds(datasets: Sequence[Dataset]) -> list[_Row]:
    return [
        (
            f"fold {number}",
            dataset.n_items,
            "items; {:,} training, {:,} validation and {:,} test users".format(
                *dataset.split_sizes
            ),
        )
        for number, dataset in enumerate(datasets, 1)
    ]
