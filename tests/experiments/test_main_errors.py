"""Mistakes in calls of main.py: status 2, one line, and nothing is written."""

import functools
import os
import shutil
import sys

import pytest
from oracles import generated

from vaecf import workdir as workdir_lib
from vaecf.data.dataset import write_dataset
from vaecf.workdir import read_json


@pytest.fixture
def here(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    return tmp_path


@pytest.fixture
def refused(here, refused):
    return functools.partial(refused, "main")


@pytest.fixture
def training(tiny, data_dir):
    return (*tiny, f"--data_dir={data_dir}", "--workdir=w", "--train")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["nothing to do", "--train, --test or --inference_benchmark"]),
        ("--train --workdir= ", ["--workdir", "one directory"]),
        ("--train --checkpoint_dir=v", ["one directory"]),
        ("--train --checkpoint_dir=", ["is empty", "one directory"]),
        ("--train --lr=0.1 --config.optimizer.learning_rate=0.2",
         ["--lr", "--config.optimizer.learning_rate=0.2 contradict"]),
        ("--train --amp --config.precision.policy=fp32",
         ["--amp", "--config.precision.policy=fp32 contradict"]),
        ("--train --data_dir=a --config.data.dir=b", ["--data_dir", "=b contra"]),
        ("--train --config.seed=None", ["--config.seed=None"]),
        ("--train --config.linear.rank=-1", ["--config.linear.rank=-1"]),
        ("--train --epocs=3", ["epocs", "Did you mean: epochs"]),
        ("--train --epochs=-1", ["--config.train.epochs=-1"]),
        ("--train --config.model.latnet=3",
         ["--config.model.latnet", "did you mean latent?"]),
        ("--train --batch_size_train=0", ["config.train.batch_size=0 must"]),
        ("--train --config.optimizer.name=adan",
         ["--config.optimizer.name='adan'", "did you mean adam?"]),
        ("--train --top_results=0", ["--top_results=0"]),
        ("--inference_benchmark --inference_batch_sizes=1,x",
         ["--inference_batch_sizes=1,x"]),
        ("--inference_benchmark --inference_batch_sizes=²",
         ["--inference_batch_sizes=²"]),
        ("--train --test --baselines=eas", ["'eas' is unknown"]),
        ("--train --test --baselines --ease_l2=0", ["--ease_l2=0"]),
        ("--train --baselines", ["--baselines", "without --test"]),
        ("--train --per_user=u", ["--per_user", "without --test"]),
        ("--test --trace", ["--trace", "without --train"]),
        ("--test --inference_batch_sizes=2", ["without --inference_benchmark"]),
        ("--test --baselines_tuned", ["--baselines_tuned", "--baselines"]),
        ("--test --ease_l2=5", ["--ease_l2", "without --baselines=ease"]),
        ("--test", ["workdir w holds no trained model"]),
        ("--inference_benchmark", ["workdir w holds no trained model"]),
        ("--train", ["no dataset in data/ml-20m", "vaecf prepare"]),
        ("--train --data_dir=empty", ["no dataset in empty"]),
        ("--train --data_dir={data} --config.eval.best_metric=ndcg",
         ["'ndcg' is not a metric"]),
        ("--train --data_dir={data} --config.mesh.data=5 --config.mesh.item=2",
         ["fit the 8"]),
        ("--train --data_dir={data} --config.precision.policy=tf32",
         ["needs an NVIDIA GPU"]),
        ("--train --workdir=file --data_dir={data}",
         ["workdir file cannot be written"]),
    ],
)  # fmt: skip
def test_nothing_is_written(refused, data_dir, arguments, words):
    given = arguments.format(data=data_dir).split()
    refused(["--workdir=w", *given], *words)


def test_no_directory(here, refused, command):
    done = command("main", "--test")
    assert (done.status, done.out) == (2, "")
    assert "--test needs the directory of a trained run" in done.err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("c.train.epochs = -1", ["train.epochs=-1 must be"]),
        ("c.train.update({'epochs': -1})", ["train.epochs=-1 must be"]),
        ("c.train.epocs = 1", ["no key 'epocs'; did you mean epochs?"]),
        ("c.train.epochs = 'many'", ["'epochs'", "many"]),
        ("c.optimizer.name = 'adan'", ["name='adan'", "did you mean adam?"]),
    ],
)
def test_a_mistake_in_a_config_file_has_its_line(
    here, refused, monkeypatch, line, words
):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (here / "mine.py").write_text(
        "from configs import default\n\n\ndef get_config():\n"
        f"    c = default.get_config()\n    {line}\n    return c\n"
    )
    flags = ("--train", "--workdir=w", "--config=mine.py")
    refused(flags, "error: mine.py, line 6: ", *words)
    # The command line takes precedence, and is blamed for its own mistakes.
    if line == "c.train.epochs = -1":
        refused((*flags, "--config.train.epochs=-2"), "error: --config.train")


def test_a_config_file_may_import_its_neighbours(here, refused, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = here / "my configs"
    folder.mkdir()
    (folder / "fewest_epochs.py").write_text("N = -3")
    (folder / "mine.py").write_text(
        "def get_config():\n    from configs import default, fewest_epochs\n"
        "    c = default.get_config()\n    c.train.epochs = fewest_epochs.N\n"
        "    return c\n"
    )
    flags = ("--train", "--workdir=w", f"--config={folder / 'mine.py'}")
    refused(flags, "line 4: ", "train.epochs=-3")


@pytest.mark.parametrize(
    "flag",
    ["--log_path=.", "--per_user=file/u.parquet", "--results_dir=file/r"],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    here, training, refused, flag
):
    path = flag.partition("=")[2]
    for lr in (0.1, 0.2):  # the mistake can be corrected in the same workdir
        more = ("--test", flag, f"--lr={lr}")
        refused((*training, *more), path, writes=True)
        config = read_json(here / "w" / "config.json")
        assert config["optimizer"]["learning_rate"] == lr
    assert not (here / "w" / "checkpoints").exists()
    assert (here / "file").read_text() == "mine"


def test_a_damaged_dataset(here, training, data_dir, refused):
    path = shutil.copytree(data_dir, here / "data") / "train.indices.npy"
    path.write_bytes(path.read_bytes()[:-4])
    refused((*training, "--data_dir=data"), path.name)


def test_no_test_users(here, training, refused):
    write_dataset(here / "data", generated(120, 0, 40, 4))
    words = ("data: the dataset has no test users", "held_out_users")
    refused((*training, "--data_dir=data", "--test"), *words)


@pytest.fixture
def workdir(trained, here):
    return shutil.copytree(trained.workdir, here / "w")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--train --lr=0.5 --amp",
         ["config.optimizer.learning_rate was 0.001 and is 0.5",
          "config.precision.policy was 'fp32' and is 'amp'"]),
        ("--test --config.model.latent=7",
         ["config.model.latent was 6 and is 7"]),
    ],
)  # fmt: skip
def test_another_config_in_the_workdir(trained, workdir, refused, flags, words):
    own = trained.training if "--train" in flags else ()
    arguments = (*own, "--workdir=w", *flags.split())
    refused(arguments, *words, "workdir w", "another workdir")


@pytest.mark.parametrize("action", ["--train", "--test"])
def test_another_dataset_in_the_workdir(workdir, here, tiny, refused, action):
    write_dataset(here / "other", generated(120, 20, 40, 4, seed=9))
    arguments = (*tiny, "--data_dir=other", "--workdir=w", action)
    refused(arguments, "another dataset", "'synthetic'", "other", "arrays")


def test_a_workdir_in_use(workdir, refused):
    with workdir_lib.locked(workdir):
        words = f"workdir w is in use by process {os.getpid()}"
        refused(("--workdir=w", "--inference_benchmark"), words)


def test_a_missing_or_damaged_checkpoint(workdir, refused):
    best = workdir / "checkpoints" / "best"
    for path in best.rglob("manifest.ocdbt"):
        path.write_bytes(path.read_bytes()[:10])
    arguments = ("--workdir=w", "--test")
    refused(arguments, "checkpoints/best", "damaged")
    shutil.rmtree(best)
    refused(arguments, "train first")
