"""Tables against texts written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from vaecf.reporting.tables import (
    recommendations_table,
    results_rows,
    results_table,
    to_markdown,
    trials_table,
)

TABLE = """\
Test results
dataset ml-1m, protocol paper, 500 users (3 left out: nothing of theirs is held out)

model          NDCG@100           Recall@20          Coverage@100
-------------  -----------------  -----------------  ------------
Mult-VAE       0.4012 ± 0.0061    0.3411 ± 0.0071 *  0.6100
EASE           0.4207 ± 0.0061 *  0.3100 ± 0.0070         –
popularity     0.2100 ± 0.0050         –                  –
planted truth  0.4655 ± 0.0060         –                  –

mean ± standard error over users; * largest mean
planted truth knows the taste groups"""

MARKDOWN = """\
**Test results** (dataset ml-1m, protocol paper, 500 users)

| model | NDCG@100 | Recall@20 | Coverage@100 |
| --- | ---: | ---: | ---: |
| Mult-VAE | 0.4012 ± 0.0061 | **0.3411 ± 0.0071** | 0.6100 |
| EASE | **0.4207 ± 0.0061** | 0.3100 ± 0.0070 | – |
| popularity | 0.2100 ± 0.0050 | – | – |
| planted truth | 0.4655 ± 0.0060 | – | – |

Mean ± standard error over users."""


def test_results_table(results: dict[str, Any]) -> None:
    text = results_table(
        results_rows(results, name="Mult-VAE"),
        title="Test results",
        protocol="paper",
        dataset="ml-1m",
        users_left_out=3,
        references=["planted truth"],
        footnote="planted truth knows the taste groups",
    )
    assert text == TABLE


def test_markdown(results: dict[str, Any]) -> None:
    text = to_markdown(
        results_rows(results, name="Mult-VAE"),
        title="Test results",
        protocol="paper",
        dataset="ml-1m",
        references=["planted truth"],
    )
    assert text == MARKDOWN


def test_users_get_a_column_where_they_differ() -> None:
    rows = {
        "a": {"ndcg@100": {"mean": 0.5, "stderr": 0.1, "users": 1000}},
        "b": {"ndcg@100": {"mean": 0.4, "stderr": 0.1, "users": 999}},
    }
    text = results_table(rows, title="t", protocol="p", dataset="d")
    assert text.splitlines() == [
        "t",
        "dataset d, protocol p, 999 to 1,000 users",
        "",
        "model  NDCG@100           users",
        "-----  -----------------  -----",
        "a      0.5000 ± 0.1000 *  1,000",
        "b      0.4000 ± 0.1000    999",
        "",
        "mean ± standard error over users; * largest mean",
    ]


def test_metrics_choose_and_order_the_columns(results: dict[str, Any]) -> None:
    text = results_table(
        results_rows(results),
        title="t",
        protocol="p",
        dataset="d",
        metrics=["recall@20", "ndcg@100", "unknown"],
    )
    assert text.splitlines()[3].split() == ["model", "Recall@20", "NDCG@100"]


@pytest.mark.parametrize("mean", [float("nan"), None])
def test_what_is_not_a_number_is_a_dash(mean: float | None) -> None:
    rows = {"a": {"ndcg@5": {"mean": mean, "stderr": 0.1, "users": 0}}}
    text = results_table(rows, title="t", protocol="p", dataset="d")
    assert "a      –" in text.splitlines()
    assert "0 users" in text


def test_hostile_names_stay_in_their_cells() -> None:
    rows = {"\x1b[31m|a*\n": {"ndcg@5": {"mean": 0.1, "users": 1}}}
    kinds: dict[str, Any] = {"title": "t", "protocol": "p", "dataset": "d"}
    assert "\x1b" not in results_table(rows, **kinds)
    line = to_markdown(rows, **kinds).splitlines()[4]
    assert line == "| \\|a\\*\N{REPLACEMENT CHARACTER} | 0.1000 |"


def test_recommendations_table() -> None:
    records: list[dict[str, Any]] = [
        {
            "user": 42,
            "history": ["Heat", "Alien", "Fargo"],
            "rows": [
                {"rank": 1, "item": 318, "title": "千尋", "score": -4.25},
                {"rank": 10, "item": 7, "title": None, "score": -10.0},
            ],
        },
        {
            "user": "u\x07",
            "history": [],
            "rows": [{"rank": 1, "item": "sku-1", "score": None}],
        },
    ]
    assert recommendations_table(records, shown_history=2).splitlines() == [
        "user 42, history: Heat; Alien; and 1 more",
        "  rank  item  title     score",
        "  ----  ----  -----  --------",
        "     1  318   千尋    -4.2500",
        "    10  7            -10.0000",
        "",
        "user u\N{REPLACEMENT CHARACTER}, history: empty",
        "  rank  item   score",
        "  ----  -----  -----",
        "     1  sku-1      –",
    ]
    assert recommendations_table([]) == ""


TRIALS = """\
Best of 2

trial  NDCG@10  best epoch  seconds  optimizer.learning_rate  model.hidden
-----  -------  ----------  -------  -----------------------  ------------
   12   0.4012      8 of 9     61.3                 0.001235            ()
    3   0.3900      1 of 2        –                   0.5000             –"""


def test_trials() -> None:
    first = {
        "number": 12,
        "value": 0.40123,
        "epochs": 9,
        "best_epoch": 8,
        "seconds": 61.3,
        "params": {
            "optimizer.learning_rate": 0.00123456,
            "model.hidden": (),
        },
    }
    second = {
        **first,
        "number": 3,
        "value": 0.39,
        "epochs": 2,
        "best_epoch": 1,
        "seconds": None,
        "params": {"optimizer.learning_rate": 0.5},
    }
    text = trials_table([first, second], metric="ndcg@10", title="Best of 2")
    assert text == TRIALS
