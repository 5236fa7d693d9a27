"""Signals while a command starts, imports, works and ends."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest

from vaecf import interrupts
from vaecf.training import signals


@pytest.fixture(params=["SIGINT", "SIGTERM"])
def number(request):
    """A signal; the handlers of before are there afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [*map(signal.getsignal, numbers), sys.unraisablehook]
    yield getattr(signal, request.param)
    assert before == [*map(signal.getsignal, numbers), sys.unraisablehook]


def wait():
    for _ in range(500):
        time.sleep(0.01)
    raise AssertionError("no interrupt came")


def test_at_the_start_a_signal_ends_the_process(number):
    code = (
        "import signal; from vaecf import interrupts\n"
        "interrupts.exit_at_once()\n"
        f"try: signal.raise_signal({int(number)})\n"
        "except BaseException: pass\n"
        "print('went on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted\n"


def test_an_interrupt(number):
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        os.kill(os.getpid(), number)
        wait()


def test_an_interrupt_waits_for_the_end_of_an_import(
    number, tmp_path, monkeypatch
):
    """As of a compiled module, which would swallow it."""
    monkeypatch.delitem(sys.modules, "interrupted_module", raising=False)
    (tmp_path / "interrupted_module.py").write_text(
        "import os, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(0.2)\n"
        "except BaseException:\n"
        "    pass\n"
        "else:\n"
        "    is_whole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        module = importlib.import_module("interrupted_module")
        assert module.is_whole
        wait()


def test_an_ignored_interrupt_comes_again(number):
    """Python ignores exceptions of callbacks such as this one."""

    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        del thing
        assert reference() is None
        wait()


def test_training_defers_an_interrupt_that_came_in_an_import(
    number, tmp_path, monkeypatch
):
    monkeypatch.delitem(sys.modules, "deferring_module", raising=False)
    (tmp_path / "deferring_module.py").write_text(
        f"import os; os.kill(os.getpid(), {int(number)})"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        importlib.import_module("deferring_module")
        with signals.interrupts() as interrupted:
            for _ in range(500):
                if interrupted():
                    raise signals.Interrupted
                time.sleep(0.01)
        raise AssertionError("no interrupt came")
