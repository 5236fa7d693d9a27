"""Weights & Biases offline and MLflow in a local store, read back.

tests/api/test_runs.py trains with a tracker.
"""

import json
import sys
import time

import pytest
from oracles import refuses

import vaecf
from vaecf.reporting import trackers

RECORDS = [
    (5, {"epoch": 1, "train/loss": 3.5, "device": "cpu", "none": None}),
    (10, {"epoch": 2, "train/loss": float("nan"), "validation/ndcg@100": 0.25}),
]
SETTINGS = {"seed": 3, "model.hidden": [600], "train.epochs": 2}


def write(name, workdir, records):
    (writer,) = trackers.open_writers([name], workdir, SETTINGS)
    for step, record in records:
        writer.write(record, step)
    writer.close()
    writer.close()
    return json.loads((workdir / f"{name}.json").read_text())["run"]


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="an extra of its own")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "movies")
    first = write("mlflow", tmp_path, RECORDS[:1])
    assert write("mlflow", tmp_path, RECORDS[1:]) == first  # resumed
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name='movies'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name) == (first, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert run.data.params == {k: str(v) for k, v in SETTINGS.items()}
    found = {
        name: [
            (m.step, m.value) for m in client.get_metric_history(first, name)
        ]
        for name in run.data.metrics
    }
    assert found == {
        "epoch": [(5, 1.0), (10, 2.0)],
        "train/loss": [(5, 3.5)],
        "validation/ndcg_100": [(10, 0.25)],
    }


def wandb_records(path):
    """Parses a .wandb file: a log of LevelDB with a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32_768 - at % 32_768
        if room < 7:  # filled up to the end of the block
            at += room
            continue
        size, kind = (
            int.from_bytes(data[at + 4 : at + 6], "little"),
            data[at + 6],
        )
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="an extra of its own")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first = write("wandb", tmp_path, RECORDS[:1])
    time.sleep(1.1)  # the names of wandb's files have seconds
    assert write("wandb", tmp_path, RECORDS[1:]) == first  # resumed
    rows, config = [], {}
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        assert first in path.name
        for record in wandb_records(path):
            for item in record.run.config.update:
                config[item.key] = json.loads(item.value_json)
            if items := record.history.item:
                names = [i.key or ".".join(i.nested_key) for i in items]
                values = [json.loads(i.value_json) for i in items]
                rows.append(dict(zip(names, values)))
    assert [row["_step"] for row in rows] == [5, 10]
    first_row = {k: v for k, v in rows[0].items() if not k.startswith("_")}
    assert first_row == {"epoch": 1, "train/loss": 3.5, "device": "cpu"}
    assert rows[1]["validation/ndcg@100"] == 0.25
    assert {key: config[key] for key in SETTINGS} == SETTINGS


def test_refusals(tmp_path, monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with refuses(rf"trackers={name} .*vaecf\[{name}\]"):
            trackers.require([name])
    with refuses(r"config\.train\.trackers=.* some of wandb, mlflow"):
        vaecf.load_config("default", {"train.trackers": ("wandbb",)})
