"""The ends of runs: signals, kills and divergence in the last moment."""

import os
import signal

import pytest
from oracles import refuses

from vaecf.reporting.writers import Writer, read_records
from vaecf.training import loop, signals
from vaecf.training.checkpoints import BEST, Checkpoints

STEPS = 4  # an epoch: 60 users, batches of 16


def finals(workdir):
    return (workdir / "metrics.jsonl").read_text().count("final/epochs")


def files(workdir):
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in (workdir / "checkpoints").rglob("*")
        if path.is_file()
    }


def test_a_signal_during_the_last_save(tmp_path, small, train, monkeypatch):
    save = Checkpoints.save

    def killed(self, which, step, *rest):
        save(self, which, step, *rest)
        if (which, step) == ("latest", STEPS):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(loop.Interrupted, match=r"after epoch 1.*resume"):
        train(tmp_path, small(train={"epochs": 1}))
    assert finals(tmp_path) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_nobody_asked_for_comes_again(number):
    """To the handler of before, which for SIGTERM is not Python's."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), signals.interrupts():
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_killed_before_the_summary(tmp_path, small, train):
    """A run with all its epochs gets its summary later, and once."""

    class Killer(Writer):
        def write(self, record, *, step):
            if "final/epochs" in record:
                raise RuntimeError("killed")

    config = small(train={"epochs": 1})
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, config, extra_writer=Killer())
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    assert "final/epochs" in lines.pop()  # as if killed one moment earlier
    path.write_text("\n".join([*lines, ""]))
    for _ in range(2):
        train(tmp_path, config)
        assert finals(tmp_path) == 1


def test_a_run_without_an_applied_step(tmp_path, small, train):
    """It has no best model, until more epochs have made one."""
    scale = {"policy": "fp16", "initial_loss_scale": 2.0**24}

    def run(epochs):
        return train(tmp_path, small(precision=scale, train={"epochs": epochs}))

    for _ in range(2):  # the same command fails again
        with refuses("all 4 steps overflowed"):
            run(1)
        assert not (tmp_path / "checkpoints" / "best").exists()
    assert run(9).progress.best_epoch > 1
    assert Checkpoints(tmp_path / "checkpoints").position(BEST)["epoch"] > 1


@pytest.mark.parametrize(
    ("rate", "message", "epochs"),
    [(1e39, "parameters are not", 2), (1e30, "scores of", 1)],
)
def test_divergence_in_the_last_step(
    tmp_path, small, train, rate, message, epochs
):
    """The loss of a step is that before its update."""
    one_step = {"epochs": 1, "batch_size": 60}
    if epochs == 2:
        train(tmp_path, small(train=one_step))
    before = files(tmp_path)
    diverging = small(
        train=one_step | {"epochs": epochs}, optimizer={"learning_rate": rate}
    )
    with refuses(f"{message}.*learning_rate"):
        train(tmp_path, diverging)
    assert files(tmp_path) == before


def test_the_printed_loss_is_the_epochs(
    tmp_path, small, dataset, monkeypatch, capsys
):
    """Not that of the last dispatch."""
    monkeypatch.setattr(signals, "STRETCH_SECONDS", 0.0)
    loop.train(small(train={"epochs": 1}), dataset, tmp_path)
    read = read_records(tmp_path / "metrics.jsonl")
    [record] = [r for r in read if "train/loss" in r]
    assert f"epoch 1/1  loss {record['train/loss']:.2f}," in (
        capsys.readouterr().err
    )


def test_float16_overflows_for_good(tmp_path, small, train):
    scale = {"initial_loss_scale": 2.0**24, "max_skipped_in_a_row": 3}
    config = small(precision={"policy": "fp16", **scale})
    with refuses(r"overflowed \d+ steps in a row.*bf16"):
        train(tmp_path, config)
