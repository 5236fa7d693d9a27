"""Exit statuses, and one line for every mistake of the user."""

import errno
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from vaecf import cli, cli_flags
from vaecf.errors import VaecfError


@pytest.fixture(autouse=True)
def own_flags():
    saved = flagsaver.save_flag_values()
    flags.FLAGS.unparse_flags()
    sys.modules.pop("config_config", None)
    yield
    flagsaver.restore_flag_values(saved)
    flags.FLAGS.mark_as_parsed()


@pytest.fixture
def run(monkeypatch, capsys):
    """run(main, *arguments) returns (status, stdout, stderr)."""

    def run(main, *arguments, config=None):
        monkeypatch.setattr(sys, "argv", ["tool.py", *arguments])
        with pytest.raises(SystemExit) as exit:
            if config is not None:
                cli.define_config(config)
            cli.run(main)
        return exit.value.code, *capsys.readouterr()

    return run


def raising(error):
    def main(argv):
        raise error

    return main


def unreachable(argv):
    raise AssertionError("must not be reached")


def test_statuses(run):
    assert run(lambda argv: None)[0] in (None, 0)
    assert run(lambda argv: 3)[0] == 3
    error = VaecfError("a.csv has\nno column\r\n'x'")
    line = "error: a.csv has no column 'x'\n"
    assert run(raising(error)) == (2, "", line)
    assert run(raising(KeyboardInterrupt())) == (130, "", "interrupted\n")
    status, _, err = run(raising(KeyboardInterrupt("in epoch 3")))
    assert (status, err) == (130, "interrupted: in epoch 3\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        send = lambda argv, n=number: signal.raise_signal(n)  # noqa: E731
        assert run(send) == (130, "", "interrupted\n")


@pytest.mark.parametrize("error", [ValueError("bug"), OSError("disk")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    with pytest.raises(type(error)) as raised:
        cli.run(raising(error))
    assert raised.value is error


def test_a_reader_that_goes_away_ends_nothing():
    """As in `main.py --train | head -1`."""
    code = (
        "import sys; from vaecf import cli\n"
        "for i in range(9999): cli.log(f'line {i}')\n"
        "print('done', file=sys.stderr)"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("line 0\n", "done\n")


def test_a_disk_that_refuses(run, tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device", "a/b")
    status, out, err = run(raising(error))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: a/b: No space left on device")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("user_column='x' is not in a.csv", "--user_column='x' is not in a.csv"),
        ("k=0 must be at least 1", "--k=0 must be at least 1"),
        ("baselines: 'x' is unknown", "--baselines: 'x' is unknown"),
        ("config.seed=-1 must be in [0, 2**32)",
         "--config.seed=-1 must be in [0, 2**32)"),
        ("give config.eval.metrics.", "give --config.eval.metrics."),
        ("w: use user_column or (k=1)", "w: use --user_column or (--k=1)"),
        *((text, text) for text in (
            "the baselines: k is not a flag here",
            "a.user_column, 'user_column', d/user_column.csv, --user_column",
            "another_k=3, min_user_column=3",
            "holds a run (config.json), not runs/k=3",
        )),
    ],
)  # fmt: skip
def test_settings_become_flags(run, message, expected):
    _, _, err = run(raising(VaecfError(message)))
    assert err == f"error: {message}\n"  # without these flags
    config = pathlib.Path(__file__).parents[1] / "configs" / "default.py"
    for name in ("user_column", "k", "baselines"):
        flags.DEFINE_string(name, None, "")
    _, _, err = run(raising(VaecfError(message)), config=config)
    assert err == f"error: {expected}\n"


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
def test_a_mistaken_flag(run, arguments, message):
    flags.DEFINE_integer("spelling", 1, "n")
    cli_flags.define_list_switch("methods", ("a", "b"), "Which")
    status, out, err = run(unreachable, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--methods", ("a", "b", "c")),
        ("--nomethods", ()),
        ("--methods=c, a", ("c", "a")),
        ("--methods=", ()),
    ],
)
def test_list_switch(run, argument, expected):
    for name in ("methods", "others"):
        cli_flags.define_list_switch(name, ("a", "b", "c"), "Which")
    seen = []
    run(lambda argv: seen.append(flags.FLAGS.flag_values_dict()), argument)
    assert (seen[0]["methods"], seen[0]["others"]) == (expected, ())


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "size.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    values = {'size': 3, 'part': {'rate': 0.5}}\n"
        "    return ml_collections.ConfigDict(values)\n"
    )
    return path


@pytest.mark.parametrize("named", [True, False], ids=["--config", "default"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sise=4", ": the config has no key 'sise'; did you mean size?"),
        ("prt.rate=1", ": the config has no key 'prt'; did you mean part?"),
        ("part.rte=1", ": the config has no key 'rte'; did you mean rate?"),
        ("part.zzzz=1", ": the config has no key 'zzzz'"),
        ("size=x", "=x: invalid literal"),
        ("part=3", "=3: "),
    ],
)
def test_a_mistaken_override(run, config, named, override, message):
    arguments = [f"--config={config}"] * named + [f"--config.{override}"]
    status, out, err = run(lambda argv: 0, *arguments, config=config)
    assert (status, out) == (2, "")
    key = override.partition("=")[0]
    assert re.match(rf"error: (flag )?--config\.{key}{re.escape(message)}", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"--config=\S*new\.py: no such file"),
        ("x = 1", r"--config names a file without get_config\(\)"),
        ("a\0b", r"--config, line 1: source code .* null bytes"),
        ("def get_config(:", r"\S*new\.py, line 1: invalid .*\(SyntaxError\)"),
        ("\nimport nowhere", r"\S*new\.py, line 2: No module named .*\)"),
        ("def get_config():\n    return open('no/x.csv')",
         r"\S*new\.py, line 2: .*'no/x.csv' \(FileNotFoundError\)"),
        ("def get_config():\n    return missing['size']",
         r"\S*new\.py, line 2: name 'missing' is not defined \(NameError\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("overrides", [(), ("--config.size=3",)])
def test_a_mistaken_config_file(run, config, overrides, text, message):
    path = config.with_name("new.py")
    if text is not None:
        path.write_text(text)

    def main(argv):
        print(flags.FLAGS["config"].value.size)

    status, out, err = run(main, f"--config={path}", *overrides, config=config)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"error: {message}.*\n", err)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"--config=/\S+: is a directory"),
        ("three.py", "--config cannot be loaded: 'int' object .*"),
    ],
)
def test_a_config_file_of_another_kind(run, config, name, message):
    (config.parent / "three.py").write_text("def get_config():\n    return 3")
    path = f"--config={config.parent / name}"
    main = cli.make_config
    changed = {"seed": ("seed", 1)}
    status, out, err = run(lambda _: main(changed), path, config=config)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"error: {message}\n", err)
