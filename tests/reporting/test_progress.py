"""Progress: a bar on a terminal, plain lines elsewhere, or nothing."""

import io
import os
import re
import sys
import termios
import threading

import pytest

from vaecf.reporting import progress
from vaecf.reporting.progress import Progress, counting


class Clock:
    def __init__(self):
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def _run(
    clock,
    *,
    epochs=50,
    stop_after=None,
    initial_epoch=0,
    seconds_per_epoch=1.0,
    enabled=True,
):
    """Four steps an epoch, two updates an epoch, a note every ten epochs."""
    with Progress(
        epochs, 4, initial_epoch=initial_epoch, enabled=enabled
    ) as bar:
        for epoch in range(initial_epoch + 1, (stop_after or epochs) + 1):
            for step in (2, 4):
                clock.now += seconds_per_epoch / 2
                bar.update(
                    epoch=epoch,
                    step_in_epoch=step,
                    loss=500.0 - epoch,
                    users_per_second=1234.5,
                )
            if epoch % 10 == 0:
                bar.note(f"epoch {epoch}: validation NDCG@100 0.40")


@pytest.mark.parametrize(
    ("kinds", "shown"),
    [
        # The validations of epochs 10 and 20 say more than epochs 11 and 21.
        ({"epochs": 23}, "1/ 10: 20: 23/"),
        ({"epochs": 4, "seconds_per_epoch": 60.0}, "1/ 2/ 3/ 4/"),
        ({"stop_after": 8}, "1/ 8/"),
        ({"epochs": 10, "initial_epoch": 8}, "9/ 10:"),
        ({"enabled": False}, ""),
    ],
    ids=["fast", "slow", "stops early", "resumed", "disabled"],
)
def test_epochs_that_get_a_plain_line(clock, capsys, kinds, shown):
    _run(clock, **kinds)
    text = capsys.readouterr().err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    lines = re.findall(r"^epoch (\d+[/:]).*", text, re.M)
    assert lines == shown.split()
    assert text.count("\n") == len(lines)
    if "1/" in lines:
        assert "loss 499.00, 1,234 users/s" in text


def test_a_notebook_gets_a_bar_and_rare_notes(clock, monkeypatch, capsys):
    bar = io.StringIO()
    bar.n, bar.update = 0, lambda n: None
    bar.set_description_str = bar.set_postfix_str = lambda text, refresh: None
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.setattr(progress, "_make_bar", lambda **options: bar)
    _run(clock, epochs=30, seconds_per_epoch=0.4)
    out, err = capsys.readouterr()
    assert re.findall(r"epoch (\d+):", out) == ["10", "30"]
    assert err == "" and bar.closed


def test_only_as_many_lines_as_the_pace_allows(clock, monkeypatch):
    said, stream = [], io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    log = progress.paced(said.append)
    for second in range(25):
        clock.now = 1000.0 + second
        log(second)
    assert said == [0, 10, 20]
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert progress.paced(print) is print


def test_notes_cannot_move_the_cursor(capsys):
    with Progress(1, 1) as bar:
        bar.note("table\nof \x1b[2Jtwo\rlines")
    assert capsys.readouterr().err == "table\nof \ufffd[2Jtwo\ufffdlines\n"


def _terminal_output(draw, monkeypatch, *, columns, rows=24):
    """What `draw()` writes to a pseudo-terminal of the given size."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (rows, columns))
    received = []

    def receive():
        try:
            while data := os.read(master, 4096):
                received.append(data)
        except OSError:  # Linux reports the other end's closing as an error.
            return

    reader = threading.Thread(target=receive)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        draw()
        monkeypatch.undo()
    reader.join(timeout=30)
    os.close(master)
    return b"".join(received).decode("utf-8")


@pytest.mark.parametrize(("rows", "columns"), [(24, 100), (0, 0)])
def test_a_terminal_gets_a_bar(rows, columns, monkeypatch):
    text = _terminal_output(
        lambda: _run(Clock(), epochs=10),
        monkeypatch,
        columns=columns,
        rows=rows,
    )
    assert "epoch 10/10 |" in text
    assert text.rstrip().endswith("00:00 left, loss 490.00, 1,234 users/s")
    longest = max(map(len, re.split(r"[\r\n]", text)))
    assert longest <= (columns or 80)
    # The note stands above the bar, which is drawn again below.
    assert "\repoch 10: validation NDCG@100 0.40\r\n" in text
    assert text.rindex("epoch 10/10 |") > text.rindex("validation")


@pytest.mark.parametrize("terminal", [False, True])
def test_counting_shows_a_bar_on_a_terminal_only(terminal, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with counting("users") as show:
        show(30, 120)
        show(120, 120)
    assert ("120/120" in stream.getvalue()) == terminal
    assert bool(stream.getvalue()) == terminal
