"""The program vaecf: its page, its commands by name, what it prints."""

import sys

import pytest
from oracles import process

from vaecf import commands
from vaecf.reporting import commands as printed


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        ((), 0, commands.COMMANDS, ()),
        (("--version",), 0, ("vaecf 0.",), ()),
        (("tset",), 2, (), ("error: 'tset' is not a command; did", "test?")),
        (("recommend", "--k=3"), 2, (), ("error: --workdir, --histories,",)),
        (
            ("train", "--config=blnd"),
            *(2, (), ("error: --config=blnd: no such", "did you mean blend?")),
        ),
    ],
)
def test_first_words(words, status, out, err, tmp_path):
    done = process(sys.executable, "-m", "vaecf", *words, cwd=tmp_path)
    assert done.returncode == status
    for text, wanted in ((done.stdout, out), (done.stderr, err)):
        assert bool(text) == bool(wanted)
        assert all(word in text for word in wanted)
    assert done.stderr.count("\n") == (status == 2)


def test_next_commands_call_what_was_called(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    values = {"config.data.dir": tmp_path / "d", "test": True}
    monkeypatch.setattr(sys, "argv", ["vaecf prepare"])
    line = printed.training("blend", "shop", values)
    assert line == (
        f"vaecf train --config=blend --workdir={tmp_path}/runs/shop "
        f"--config.data.dir={tmp_path}/d --test"
    )
    monkeypatch.setattr(sys, "argv", ["/a b/experiments/prepare_dataset.py"])
    line = printed.training("blend", "shop", values)
    assert line.startswith(
        "python '/a b/experiments/main.py' --train --config="
    )
    assert line.split()[4].endswith("/configs/blend.py")
