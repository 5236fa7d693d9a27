"""Where compiled programs are kept, and who decides. Loading them is tested
with the entry points."""

import os
import sys

import jax
import platformdirs
import pytest

from vaecf import cli
from vaecf.training import compilation_cache

DIRECTORY = "jax_compilation_cache_dir"
ENABLED = "jax_enable_compilation_cache"
THRESHOLD = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def config():
    """Returns a reader of JAX's settings, which start as in a new process."""
    names = (DIRECTORY, ENABLED, THRESHOLD)
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (None, True, 1.0), strict=True):
        jax.config.update(name, value)
    yield lambda name: getattr(jax.config, name)
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    """The user's cache directory, not there yet."""
    path = tmp_path / "cache"
    monkeypatch.setattr(
        platformdirs, "user_cache_dir", lambda name: path / name
    )
    monkeypatch.delenv(THRESHOLD.upper(), raising=False)
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    return path


def test_the_users_cache_is_the_default(config, user_cache):
    compilation_cache.use_compilation_cache()
    directory = user_cache / "vaecf" / "jax"
    assert config(DIRECTORY) == str(directory)
    assert config(THRESHOLD) == 0
    assert list(directory.iterdir()) == []
    if os.name == "posix":
        # A program that is loaded is run: nobody else may write one.
        assert directory.stat().st_mode & 0o077 == 0
    compilation_cache.use_compilation_cache()
    assert config(DIRECTORY) == str(directory)


@pytest.mark.parametrize(
    ("name", "value"), [(DIRECTORY, "mine"), (DIRECTORY, ""), (ENABLED, False)]
)
def test_settings_of_the_user_win(config, user_cache, monkeypatch, name, value):
    jax.config.update(name, value)
    compilation_cache.use_compilation_cache()
    directory = value if name == DIRECTORY else None
    assert config(DIRECTORY) == directory and config(THRESHOLD) == 1
    assert not user_cache.exists()
    monkeypatch.setenv(THRESHOLD.upper(), "1")
    jax.config.update(DIRECTORY, None)
    jax.config.update(ENABLED, True)
    compilation_cache.use_compilation_cache()
    assert config(DIRECTORY) is not None and config(THRESHOLD) == 1


def test_a_directory_that_cannot_be_written_fails_nothing(
    config, user_cache, capsys
):
    # Only entry points that ask keep programs.
    with pytest.raises(SystemExit):
        cli.run(lambda argv: None)
    assert config(DIRECTORY) is None and not user_cache.exists()
    user_cache.write_text("a file where the directory should be")
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda argv: print("done"), use_compilation_cache=True)
    out, err = capsys.readouterr()
    assert exit.value.code in (None, 0) and out == "done\n"
    assert err.startswith("warning: ") and err.count("\n") == 1
    assert str(user_cache) in err
    assert config(DIRECTORY) is None and config(THRESHOLD) == 1


def test_what_was_used_longest_ago_goes_first(config, user_cache):
    directory = user_cache / "vaecf" / "jax"
    (directory / "autotuned").mkdir(parents=True)
    names = ("new-cache", "autotuned/old", "read-cache", "middle-cache")
    for name, used in zip(names, (400, 100, 300, 200), strict=True):
        (directory / name).write_bytes(bytes(10))
        os.utime(directory / name, (used, 50 if "read" in name else used))
    compilation_cache.use_compilation_cache(max_bytes=25)
    left = {path.name for path in directory.iterdir() if path.is_file()}
    assert left == {"new-cache", "read-cache"}
    assert list((directory / "autotuned").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners here")
def test_a_directory_that_others_can_write_is_not_used(config, user_cache):
    directory = user_cache / "vaecf" / "jax"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    with pytest.raises(OSError, match="can write there"):
        compilation_cache.use_compilation_cache()
    assert config(DIRECTORY) is None
