"""Exit statuses, and one line for whatever goes wrong."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable, Iterator

import pytest
from absl import flags
from absl.testing import flagsaver

from vaecf import cli
from vaecf.errors import VaecfError


@pytest.fixture(autouse=True)
def own_flags() -> Iterator[None]:
    saved = flagsaver.save_flag_values()
    flags.FLAGS.unparse_flags()
    yield
    flagsaver.restore_flag_values(saved)
    flags.FLAGS.mark_as_parsed()


Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    def run(main, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["tool.py", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.run(main)
        return exit.value.code, *capsys.readouterr()

    return run


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


def test_statuses(run: Run) -> None:
    assert run(lambda argv: None)[0] in (None, 0)
    assert run(lambda argv: 3)[0] == 3
    status, out, err = run(raising(VaecfError("a.csv has no column 'x'")))
    assert (status, out) == (2, "")
    assert err == "error: a.csv has no column 'x'\n"


def test_one_line_whatever_the_message(run: Run) -> None:
    _, _, err = run(raising(VaecfError("first\nsecond\r\nthird")))
    assert err == "error: first second third\n"


def test_an_interrupt(run: Run) -> None:
    assert run(raising(KeyboardInterrupt())) == (130, "", "interrupted\n")
    status, _, err = run(raising(KeyboardInterrupt("in epoch 3")))
    assert (status, err) == (130, "interrupted: in epoch 3\n")


@pytest.mark.parametrize(
    "error", [ValueError("bug"), OSError("disk"), ZeroDivisionError()]
)
def test_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    with pytest.raises(type(error)) as raised:
        cli.run(raising(error))
    assert raised.value is error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "unexpected argument 'train': flags start with --"),
        (["--speling=1"], "Unknown command line flag 'speling'. "
         "Did you mean: spelling ?"),
        (["--spelling=x"], "flag --spelling=x: invalid literal for int"),
        (["--spelling"], "Missing value for flag --spelling"),
        (["--methods=d"], "flag --methods=d: 'd' is unknown, use one of a, b"),
    ],
)  # fmt: skip
def test_a_mistaken_flag(run: Run, arguments: list[str], message: str) -> None:
    flags.DEFINE_integer("spelling", 1, "n")
    cli.define_list_switch("methods", ("a", "b"), "Which")

    def main(argv):
        raise AssertionError("must not be reached")

    status, out, err = run(main, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ()),
        (["--methods"], ("a", "b", "c")),
        (["--nomethods"], ()),
        (["--methods=b"], ("b",)),
        (["--methods=c, a"], ("c", "a")),
        (["--methods="], ()),
    ],
)
def test_list_switch(
    run: Run, arguments: list[str], expected: tuple[str, ...]
) -> None:
    cli.define_list_switch("methods", ("a", "b", "c"), "Which")
    seen = []
    run(lambda argv: seen.append(flags.FLAGS["methods"].value), *arguments)
    assert seen == [expected]


CONFIG = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict({"size": 3, "part": {"rate": 0.5}})
    return config
"""


@pytest.mark.parametrize("named", [True, False], ids=["--config", "default"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.sise=4", "--config.sise: the config has no key 'sise'; "
         "did you mean size?"),
        ("--config.prt.rate=1", "--config.prt.rate: the config has no key "
         "'prt'; did you mean part?"),
        ("--config.part.rte=1", "--config.part.rte: the config has no key "
         "'rte'; did you mean rate?"),
        ("--config.size=x", "flag --config.size=x: invalid literal"),
        ("--config.part=3", "flag --config.part=3: "),
    ],
)  # fmt: skip
def test_a_mistaken_override(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    named: bool,
    override: str,
    message: str,
) -> None:
    """Whether the config is named on the command line or is the default."""
    path = tmp_path / "size.py"
    path.write_text(CONFIG)
    arguments = [f"--config={path}"] * named + [override]
    monkeypatch.setattr(sys, "argv", ["tool.py", *arguments])

    def define_and_run() -> None:
        cli.define_config(path)
        cli.run(lambda argv: 0)

    with pytest.raises(SystemExit) as exit:
        define_and_run()
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_the_config_flag(tmp_path: pathlib.Path, run: Run, monkeypatch) -> None:
    path = tmp_path / "size.py"
    path.write_text(CONFIG)
    monkeypatch.setattr(sys, "argv", ["tool.py", "--config.size=9"])
    holder = cli.define_config(path)
    seen = []
    run(lambda argv: seen.append(holder.value), "--config.size=9")
    assert seen[0].to_dict() == {"size": 9, "part": {"rate": 0.5}}
    assert seen[0].is_locked


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"--config=\S*new\.py: no such file"),
        ("x = 1", r"--config names a file without get_config\(\)"),
        (
            "def get_config(:",
            r"--config=\S*new\.py, line 1: invalid syntax \(SyntaxError\)",
        ),
        (
            "\nimport nowhere_to_be_had",
            r"--config=\S*new\.py, line 2: No module named .*\)",
        ),
        (
            "def get_config():\n    return open('no/x.csv')",
            r"--config=\S*new\.py, line 2: .*'no/x.csv' \(FileNotFoundError\)",
        ),
    ],
)
@pytest.mark.parametrize("overrides", [(), ("--config.size=3",)])
def test_a_config_that_is_none(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    text: str | None,
    message: str,
) -> None:
    default, path = tmp_path / "size.py", tmp_path / "new.py"
    default.write_text(CONFIG)
    if text is not None:
        path.write_text(text)
    sys.modules.pop("config_config", None)
    arguments = [f"--config={path}", *overrides]
    monkeypatch.setattr(sys, "argv", ["tool.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        holder = cli.define_config(default)
        sys.modules.pop("config_config", None)
        cli.run(lambda argv: print(holder.value.size))
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert re.fullmatch(f"error: {message}.*\n", err)
