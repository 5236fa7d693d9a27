"""Entry points called in this process, on a small dataset."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import pathlib
import shutil
import sys
from typing import NamedTuple

import pytest
from absl import flags
from absl.testing import flagsaver
from oracles import ROOT, generated

from vaecf import cli
from vaecf.data import dataset
from vaecf.workdir import read_json


class Done(NamedTuple):
    status: int
    out: str
    err: str


@contextlib.contextmanager
def entry_point(script, *arguments):
    """Yields the module behind a script; its flags are removed afterwards."""
    path = ROOT / "experiments" / f"{script}.py"
    saved, argv, search = flagsaver.save_flag_values(), sys.argv, sys.path[:]
    sys.argv = [str(path), *arguments]
    flags.FLAGS.unparse_flags()
    try:
        if (ROOT / "vaecf" / "commands" / path.name).exists():
            yield importlib.import_module(f"vaecf.commands.{script}")
            return
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location("entry_point", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["entry_point"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.argv, sys.path[:] = argv, search
        for name in ("entry_point", "config_config"):
            sys.modules.pop(name, None)
        flagsaver.restore_flag_values(saved)
        flags.FLAGS.mark_as_parsed()


def call(script, *arguments):
    """Runs `python experiments/<script>.py <arguments>` in this process."""
    texts = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with entry_point(script, *texts) as module:
                cli.run(
                    module.main,
                    define=getattr(module, "define", None),
                    takes_arguments=script == "compare",
                )
            raise AssertionError(f"{script} did not exit")
        except SystemExit as exit:
            assert exit.code is None or isinstance(exit.code, int), exit.code
            return Done(exit.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def command():
    """Runs an entry point: command("main", "--train", ...)."""
    return call


@pytest.fixture(scope="session")
def succeeds():
    """succeeds(script, ...) is `command` with status 0; returns stdout."""

    def succeeds(script, *arguments):
        done = call(script, *arguments)
        assert done.status == 0, done.err
        return done.out

    return succeeds


@pytest.fixture
def refused(tmp_path, monkeypatch, command):
    """refused(script, [flags], *words): status 2, one line, nothing is written.

    The current directory is that of the test.
    """
    monkeypatch.chdir(tmp_path)

    def listing():
        ours = (".lock", ".verified.json")
        paths = [p for p in tmp_path.rglob("*") if p.name not in ours]
        return {p: p.read_bytes() if p.is_file() else None for p in paths}

    def refused(script, arguments, *words, writes=False):
        before = listing()
        done = command(script, *arguments)
        assert done.status == 2 and (writes or done.out == ""), done
        # Work that began may have shown its progress first.
        err = done.err.splitlines(keepends=True)[-1] if writes else done.err
        assert err.startswith("error: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        for word in words:
            assert word in err, done.err
        assert writes or listing() == before

    return refused


@contextlib.contextmanager
def parse(script, *arguments):
    with entry_point(script, *arguments) as module:
        if define := getattr(module, "define", None):
            define()
        flags.FLAGS(sys.argv)
        yield module


@pytest.fixture(scope="session")
def parsed():
    """Yields the module of an entry point after its flags are parsed."""
    return parse


@pytest.fixture(scope="session")
def tiny():
    """Flags of a model that trains in a second."""
    return (
        f"--config={ROOT / 'configs' / 'synthetic.py'}",
        "--config.model.hidden=(12,)",
        "--config.model.latent=6",
        "--config.mesh.data=1",
        "--config.eval.metrics=('ndcg@100','recall@5')",
        "--batch_size_train=50",
        "--batch_size_validation=16",
        "--epochs=3",
        "--validation_step=1",
    )


@pytest.fixture(scope="session")
def oracle_dir(tmp_path_factory):
    """120 + 20 + 20 users, 40 items, and the probabilities behind them."""
    path = tmp_path_factory.mktemp("oracle") / "data"
    return dataset.write_dataset(path, generated(120, 20, 40, 4)).path


@pytest.fixture(scope="session")
def data_dir(oracle_dir, tmp_path_factory):
    """The same dataset without the oracle, as real data are."""
    path = tmp_path_factory.mktemp("real") / "data"
    shutil.copytree(oracle_dir, path)
    manifest = read_json(path / "manifest.json")
    for name in [n for n in manifest["arrays"] if n.startswith("oracle.")]:
        del manifest["arrays"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that did everything at once."""

    folder: pathlib.Path  # holds the workdir 'run' and the other outputs
    training: tuple[str, ...]  # flags of the training, without --workdir
    done: Done

    @property
    def workdir(self):
        return self.folder / "run"


@pytest.fixture(scope="session")
def trained(tiny, oracle_dir, tmp_path_factory):
    """Tests must not write to it: they copy the workdir."""
    folder = tmp_path_factory.mktemp("trained")
    training = (*tiny, f"--data_dir={oracle_dir}", "--train")
    done = call(
        *("main", *training, f"--workdir={folder / 'run'}"),
        *("--test", "--baselines", "--inference_benchmark", "--trace", "--xla"),
        *("--inference_batch_sizes=1,3", "--top_results=7"),
        f"--log_path={folder / 'log.json'}",
        f"--results_dir={folder / 'results'}",
        f"--per_user={folder / 'per_user.parquet'}",
    )
    assert done.status == 0, done.err
    return Trained(folder, training, done)
