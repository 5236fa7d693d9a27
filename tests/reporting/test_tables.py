"""Tables: the numbers are there, columns line up, names stay in their cells."""

import pytest

from vaecf.models import registry
from vaecf.reporting import tables


def _cells(text):
    """Cells by the first cell of a line, split at two spaces."""
    lines = [line.split("  ") for line in text.splitlines() if line.strip()]
    return {
        line[0].strip(): [cell.strip() for cell in line[1:] if cell.strip()]
        for line in lines
    }


def test_format_table():
    rows = [
        {"name": "a", "n": 1},
        {"name": "千尋", "n": 2000},
        {"name": "c\x1bd\n"},
    ]
    assert tables.format_table(rows).splitlines() == [
        "name      n",
        "----  -----",
        "a         1",
        "千尋  2,000",
        "c\N{REPLACEMENT CHARACTER}d\N{REPLACEMENT CHARACTER}      –",
    ]


def test_a_wide_table_is_split(monkeypatch):
    monkeypatch.setenv("COLUMNS", "14")
    row = {"m": "a", "s": 1, "x": "1234", "y": "5678", "z": "a long one"}
    assert tables.format_table([row], keys=2).splitlines() == [
        *("m  s     x", "-  -  ----", "a  1  1234", ""),
        *("m  s     y", "-  -  ----", "a  1  5678", ""),
        *("m  s  z", "-  -  ----------", "a  1  a long one"),
    ]
    monkeypatch.setenv("COLUMNS", "16")  # of the first two, 16 columns
    assert tables.format_table([row], keys=2).splitlines() == [
        *("m  s     x     y", "-  -  ----  ----", "a  1  1234  5678", ""),
        *("m  s  z", "-  -  ----------", "a  1  a long one"),
    ]


def test_settings_of_models_move_below_a_wide_table(monkeypatch, results):
    monkeypatch.setenv("COLUMNS", "40")
    baselines = results["baselines"]
    baselines["ease (l2 500)"] = baselines.pop("EASE")
    rows = tables.results_rows(results, name="Mult-VAE")
    text = tables.results_table(rows, protocol="p", dataset="d")
    *table, notes = text.split("\n\n")
    assert all(len(line) <= 40 for line in "\n".join(table).splitlines())
    assert "ease (l2 500)" in notes and "(l2" not in "".join(table)


def test_quantities_and_metric_labels():
    values = [True, None, 1234567, 0.40123, 0.00123456, "a", (600, 200)]
    texts = ["True", "–", "1,234,567", "0.4012", "0.001235", "a", "(600, 200)"]
    assert [*map(tables.quantity, values)] == texts
    names = ["ndcg@100", "hit_rate@5", "mrr@10", "auc"]
    labels = ["NDCG@100", "Hit rate@5", "MRR@10", "AUC"]
    assert [*map(tables.metric_label, names)] == labels


def test_names_of_models():
    """Every model has a name as people write it."""
    for name in {*registry.MODELS, *registry.FITTED} - {"popularity"}:
        assert tables.model_name(name).replace("-", "_").lower() in (
            name,
            name.replace("_", ""),
        )
        assert tables.model_name(name) != name
    assert tables.model_name("ease (l2 500)") == "EASE (l2 500)"
    named = tables.model_name("rec_vae+linear", ("gain", "ials_gain", "prior"))
    assert named == "blend of RecVAE and EASE, ALS"
    unknown = tables.model_name("mult_vae+linear")
    assert unknown == "blend of Mult-VAE and linear models"


def test_names_are_short_while_they_differ():
    names = ["EASE (l2 500)", "RecVAE (seed 1)", "RecVAE (seed 2)"]
    assert [*tables.short_names(names).values()] == ["EASE", *names[1:]]


def test_results_table(results):
    text = tables.results_table(
        tables.results_rows(results, name="Mult-VAE"),
        protocol="paper",
        dataset="ml-1m",
        users_left_out=3,
        references=["planted truth"],
    )
    lines = text.splitlines()
    for fact in ("dataset ml-1m", "protocol paper", "500 users", "3 left out"):
        assert fact in lines[1]
    cells = _cells(text)
    assert cells["model"] == ["NDCG@100", "Recall@20", "Coverage@100"]
    # The reference has the largest NDCG and no star.
    assert cells["Mult-VAE"] == [
        "0.4012 ± 0.0061",
        "0.3411 ± 0.0071 *",
        "0.6100",
    ]
    assert cells["EASE"] == ["0.4207 ± 0.0061 *", "0.3100 ± 0.0070", "–"]
    assert cells["planted truth"] == ["0.4655 ± 0.0060", "–", "–"]
    assert "recall: hits / min(k, held-out items)" in lines[-1]
    assert "plain" not in lines[-1]


@pytest.mark.parametrize("mean", [float("nan"), None])
def test_a_mean_that_is_not_a_number_is_a_dash(mean):
    rows = {"a": {"ndcg@5": {"mean": mean, "stderr": 0.1, "users": 0}}}
    text = tables.results_table(rows, protocol="p", dataset="d")
    assert _cells(text)["a"] == ["–"]
    assert "0 users" in text


def test_recommendations_table():
    records = [
        {
            "user": 42,
            "history": ["Heat", *"abcde"],
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
    text = tables.recommendations_table(records)
    first, second = text.split("\n\n")
    assert "user 42, history: Heat; a; b; c; d; and 1 more" in first
    assert first.splitlines()[3].split() == ["1", "318", "千尋", "-4.2500"]
    assert first.splitlines()[4].split() == ["10", "7", "–", "-10.0000"]
    assert "user u\N{REPLACEMENT CHARACTER}, history: empty" in second
    assert "title" not in second
    assert second.splitlines()[-1].split() == ["1", "sku-1", "–"]
    assert tables.recommendations_table([]) == ""
