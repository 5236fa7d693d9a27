"""Progress: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import io
import os
import re
import sys
import termios
import threading
from collections.abc import Callable
from typing import TextIO

import pytest

from vaecf.reporting.progress import Progress, counting


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _run(
    stream: TextIO,
    *,
    epochs: int = 50,
    seconds_per_epoch: float = 1.0,
    stop_after: int | None = None,
    enabled: bool | None = None,
) -> Clock:
    """Four steps an epoch, two reports an epoch."""
    clock = Clock()
    with Progress(
        epochs,
        4,
        1000,
        stream=stream,
        clock=clock,
        enabled=enabled,
    ) as bar:
        for epoch in range(1, (stop_after or epochs) + 1):
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
    return clock


def test_no_control_characters_and_the_last_epoch_elsewhere() -> None:
    stream = io.StringIO()
    _run(stream)
    text = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    lines = text.splitlines()
    assert lines[-1] == "epoch 50: validation NDCG@100 0.40"
    assert lines[-2] == (
        "epoch 50/50  loss 450.00  1,234 users/s  time left 0:00"
    )


def test_lines_are_five_seconds_apart() -> None:
    stream = io.StringIO()
    _run(stream, epochs=23)
    shown = [
        int(n) for n in re.findall(r"^epoch (\d+)/", stream.getvalue(), re.M)
    ]
    assert shown == [1, 6, 11, 16, 21, 23]


def test_long_epochs_have_a_line_each() -> None:
    stream = io.StringIO()
    _run(stream, epochs=4, seconds_per_epoch=60.0)
    assert len(stream.getvalue().splitlines()) == 4


def test_early_stop_shows_the_last_epoch_reached() -> None:
    stream = io.StringIO()
    _run(stream, stop_after=8)
    assert stream.getvalue().splitlines()[-1].startswith("epoch 8/50 ")


def test_silence() -> None:
    stream = io.StringIO()
    _run(stream, enabled=False)
    assert stream.getvalue() == ""


def test_notes_cannot_move_the_cursor() -> None:
    stream = io.StringIO()
    with Progress(1, 1, 1, stream=stream) as bar:
        bar.note("table\nof \x1b[2Jtwo\rlines")
    assert stream.getvalue() == "table\nof two\nlines\n"


def test_time_left_ignores_the_first_dispatch() -> None:
    clock = Clock()
    bar = Progress(10, 4, 1000, stream=io.StringIO(), clock=clock)
    assert bar.seconds_left() is None
    clock.now += 100.0  # Compiling.
    bar.update(epoch=1, step_in_epoch=2)
    assert bar.seconds_left() is None
    clock.now += 3.0
    bar.update(epoch=1, step_in_epoch=4)
    # 3 s for 2 steps; 36 of 40 steps to go.
    assert bar.seconds_left() == pytest.approx(54.0)


def test_time_left_of_a_resumed_run() -> None:
    clock = Clock()
    stream = io.StringIO()
    bar = Progress(10, 4, 1000, initial_epoch=8, stream=stream, clock=clock)
    for step in (2, 4):
        clock.now += 1.0
        bar.update(epoch=9, step_in_epoch=step)
    # 1 s for 2 steps; 4 of 40 steps to go. 250 users a step: 500 a second.
    assert bar.seconds_left() == pytest.approx(2.0)
    assert stream.getvalue() == (
        "epoch 9/10  loss –  500 users/s  time left 0:02\n"
    )


def _terminal_output(
    draw: Callable[[TextIO], object], *, columns: int, rows: int = 24
) -> str:
    """What `draw(stream)` writes to a pseudo-terminal of that size."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (rows, columns))
    received = []

    def receive() -> None:
        try:
            while data := os.read(master, 4096):
                received.append(data)
        except OSError:  # How Linux says that the other end is closed.
            return

    reader = threading.Thread(target=receive)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        draw(stream)
    reader.join(timeout=30)
    os.close(master)
    return b"".join(received).decode("utf-8")


@pytest.mark.parametrize(("rows", "columns"), [(24, 100), (0, 0)])
def test_a_terminal_gets_a_bar(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(stream: TextIO) -> None:
        # tqdm asks the standard streams, and only those, for their size.
        monkeypatch.setattr(sys, "stderr", stream)
        _run(stream, epochs=3)
        monkeypatch.undo()

    text = _terminal_output(run, columns=columns, rows=rows)
    assert "\r" in text
    assert "epoch 3/3 |" in text
    assert "loss 497.00" in text
    assert "1,234 users/s" in text
    assert text.rstrip().endswith("0:00 left")
    longest = max(map(len, re.split(r"[\r\n]", text)))
    assert longest <= (columns or 80)


def test_notes_stand_above_the_bar() -> None:
    text = _terminal_output(lambda s: _run(s, epochs=10), columns=100)
    assert "\repoch 10: validation NDCG@100 0.40\r\n" in text
    # The bar is drawn again below.
    assert text.rindex("epoch 10/10 |") > text.rindex("validation")


def test_counting_shows_a_bar_on_a_terminal_only(monkeypatch, capsys):
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda shown=terminal: shown)
        with counting("users") as show:
            show(30, 120)
            show(120, 120)
        written = capsys.readouterr().err
        assert ("120/120" in written) == terminal
        assert bool(written) == terminal
