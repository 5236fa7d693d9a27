"""The recipe's log: DLLogger's line format, names, units and means."""

import json
import time

from vaecf.reporting.recipe_log import RecipeLogWriter


def _lines(path):
    lines = []
    for line in path.read_text().splitlines():
        prefix, payload = line.split(" ", 1)
        assert prefix == "DLLL"
        lines.append(json.loads(payload))
    return lines


def _epoch(writer, epoch, speed):
    writer.write(
        {
            "epoch": epoch,
            "train/loss": 400.0,
            "train/kl": 3.0,
            "train/epoch_seconds": 0.5,
            "train/users_per_second": speed,
        },
        step=epoch * 28,
    )


def test_a_run(tmp_path, monkeypatch):
    path = tmp_path / "logs" / "vae_cf.log"
    path.parent.mkdir()
    path.write_text("an older run's log\n")
    now = map(float, range(100, 200))
    monkeypatch.setattr(time, "time", lambda: next(now))
    writer = RecipeLogWriter(path)
    writer.parameters(
        {"epochs": 3, "path": path, "dims": (600, 200), "x": float("nan")}
    )
    for epoch, speed in ((1, 10.0), (2, 100.0), (3, 300.0)):
        _epoch(writer, epoch, speed)
    for ndcg, seconds, speed in ((0.3, 4.0, 50.0), (0.4, 2.0, 100.0)):
        writer.write(
            {
                "epoch": 3,
                "validation/ndcg@100": ndcg,
                "validation/ndcg@100_stderr": 0.01,
                "validation/seconds": seconds,
                "validation/users_per_second": speed,
            },
            step=84,
        )
    writer.elapsed_seconds = 9.0
    writer.final({"extra": (1, "s")}, warm_up_epochs=1)
    lines = _lines(path)
    logs = [line for line in lines if line["type"] == "LOG"]
    keys = ["timestamp", "elapsedtime", "datetime", "type", "step", "data"]
    assert list(logs[0]) == keys
    assert (logs[0]["timestamp"], logs[0]["elapsedtime"]) == ("101.0", "1.0")
    assert logs[0]["step"] == "PARAMETER"
    assert logs[0]["data"] == {
        "epochs": 3,
        "path": str(path),
        "dims": [600, 200],
        "x": "nan",
    }
    assert [log["step"] for log in logs[1:]] == [[1], [2], [3], [3], [3], []]
    assert logs[1]["data"] == {
        "train_loss": 400.0,
        "train_epoch_time": 0.5,
        "train_throughput": 10.0,
    }
    assert logs[5]["data"] == {
        "ndcg@100": 0.4,
        "ndcg@100_stderr": 0.01,
        "valid_time": 2.0,
        "inference_throughput": 100.0,
    }
    # The names of log_final_stats in the recipe's vae/models/train.py.
    assert logs[6]["data"] == {
        "total_train_time": 1.5,
        "total_valid_time": 6.0,
        "average_train_epoch time": 0.5,
        "average_validation_time": 3.0,
        "total_elapsed_time": 9.0,
        "mean_training_throughput": 200.0,
        "mean_inference_throughput": 75.0,
        "max_training_throughput": 300.0,
        "max_inference_throughput": 100.0,
        "final_ndcg@100": 0.4,
        "extra": 1,
    }


def test_every_unit_is_declared_once_and_before_its_values(tmp_path):
    path = tmp_path / "vae_cf.log"
    writer = RecipeLogWriter(path)
    _epoch(writer, 1, 10.0)
    _epoch(writer, 2, 10.0)
    writer.final({"batch_1_mean_latency": (0.01, "s")})
    units = {}
    for line in _lines(path):
        if line["type"] == "METADATA":
            assert line["metric"] not in units
            units[line["metric"]] = line["metadata"]["unit"]
        else:
            assert set(line["data"]) <= set(units)
    assert units["train_throughput"] == "users/s"
    assert units["mean_training_throughput"] == "users/s"
    assert units["train_epoch_time"] == "s"
    assert units["batch_1_mean_latency"] == "s"


def test_a_short_run_is_all_warm_up(tmp_path):
    path = tmp_path / "vae_cf.log"
    writer = RecipeLogWriter(path)
    _epoch(writer, 1, 10.0)
    writer.final({}, warm_up_epochs=5)
    assert _lines(path)[-1]["data"]["mean_training_throughput"] == 10
