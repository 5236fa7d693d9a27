"""Every way to get main.py wrong: status 2, one line, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from vaecf.data import synthetic
from vaecf.data.dataset import open_dataset, write_dataset

ROOT = pathlib.Path(__file__).resolve().parents[2]


def listing(folder: pathlib.Path) -> dict[str, str | None]:
    """What is in a folder, with digests of the files' content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        if path.is_file()
        else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def refused(done, *messages: str) -> None:
    assert done.status == 2, done
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1 and done.err.endswith("\n")
    for message in messages:
        assert message in done.err


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("", ["nothing to do", "--train, --test or --inference_benchmark"]),
        ("--workdir=w", ["nothing to do"]),
        ("--train", ["--workdir", "is missing"]),
        ("--train --workdir=w --checkpoint_dir=v", ["give one of them"]),
        ("--train --workdir=w train", ["unexpected argument 'train'"]),
        ("--train --workdir=w --epocs=3", ["epocs", "Did you mean: epochs"]),
        ("--train --workdir=w --epochs=many", ["--epochs=many"]),
        ("--train --workdir=w --epochs=-1", ["config.train.epochs=-1"]),
        ("--train --workdir=w --config.modl.latent=3",
         ["--config.modl.latent", "did you mean model?"]),
        ("--train --workdir=w --config.model.latnet=3",
         ["--config.model.latnet", "did you mean latent?"]),
        ("--train --workdir=w --config.model.latent=x",
         ["--config.model.latent=x"]),
        ("--train --workdir=w --config.model.hidden=3.5",
         ["config.model.hidden=3.5"]),
        ("--train --workdir=w --config=ml1n.py", ["--config", "ml1n.py"]),
        ("--train --workdir=w --batch_size_train=0",
         ["config.train.batch_size=0 must be at least 1"]),
        ("--train --workdir=w --batch_size_validation=0",
         ["config.eval.batch_size=0 must be at least 1"]),
        ("--train --workdir=w --validation_step=0",
         ["config.eval.every_epochs=0 must be at least 1"]),
        ("--train --workdir=w --activation=gelu",
         ["config.model.activation='gelu' must be one of", "tanh, relu"]),
        ("--train --workdir=w --lr=0", ["config.optimizer.learning_rate=0.0"]),
        ("--train --workdir=w --lr=nan", ["config.optimizer.learning_rate=nan"]),
        ("--train --workdir=w --seed=-1", ["config.seed=-1"]),
        ("--train --workdir=w --config.precision.policy=tf32",
         ["config.precision.policy='tf32'", "use fp32 or bf16"]),
        ("--train --workdir=w --config.mesh.data=64",
         ["config.mesh.data=64", "8 devices"]),
        ("--train --workdir=w --config.eval.metrics=('ngcd@10',)",
         ["'ngcd@10' is not a metric"]),
        ("--train --workdir=w --config.eval.best_metric=ngcd@10",
         ["'ngcd@10' is not a metric"]),
        ("--train --workdir=w --top_results=0", ["--top_results=0"]),
        ("--inference_benchmark --workdir=w --inference_batch_sizes=1,x",
         ["--inference_batch_sizes=1,x"]),
        ("--inference_benchmark --workdir=w --inference_batch_sizes=²",
         ["--inference_batch_sizes=²"]),
        ("--train --test --workdir=w --baselines=eas", ["'eas' is unknown"]),
        ("--train --test --workdir=w --baselines --ease_l2=0", ["ease_l2=0"]),
        ("--train --workdir=w --baselines", ["--baselines", "without --test"]),
        ("--train --workdir=w --per_user=u", ["--per_user", "without --test"]),
        ("--test --workdir=w --trace", ["--trace", "without --train"]),
        ("--test --workdir=w --inference_batch_sizes=2",
         ["--inference_batch_sizes", "without --inference_benchmark"]),
        ("--test --workdir=w", ["workdir w holds no trained model"]),
        ("--inference_benchmark --workdir=w",
         ["workdir w holds no trained model"]),
        ("--train --workdir=w", ["no dataset in data/ml-20m",
         "prepare_dataset.py"]),
        ("--train --workdir=w --data_dir=empty", ["no dataset in empty"]),
        ("--train --workdir=file --data_dir={data}",
         ["workdir file cannot be written"]),
    ],
)  # fmt: skip
def test_nothing_is_begun(here, data_dir, command, arguments, messages) -> None:
    (here / "empty").mkdir()
    (here / "file").write_text("mine")
    before = listing(here)
    done = command("main", *arguments.format(data=data_dir).split())
    refused(done, *messages)
    assert done.out == ""
    assert listing(here) == before


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--log_path=file/log.json", "file/log.json"),
        ("--log_path=.", "."),
        ("--per_user=file/u.parquet", "--per_user=file/u.parquet"),
        ("--results_dir=file/r", "--results_dir=file/r"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(
    here, tiny, data_dir, command, flag, named
) -> None:
    (here / "file").write_text("mine")
    done = command(
        "main", *tiny, f"--data_dir={data_dir}", "--workdir=w", "--train",
        "--test", flag,
    )  # fmt: skip
    refused(done, named)
    assert not (here / "w" / "checkpoints").exists()
    assert (here / "file").read_text() == "mine"


def test_a_refused_run_does_not_claim_its_workdir(
    here, tiny, data_dir, command
) -> None:
    """What was wrong can be put right in the same workdir."""
    (here / "file").write_text("mine")
    arguments = (
        *tiny, f"--data_dir={data_dir}", "--workdir=w", "--train", "--test",
        "--per_user=file/u.parquet",
    )  # fmt: skip
    for flag in ("--lr=0.1", "--lr=0.2"):
        refused(command("main", *arguments, flag), "--per_user=file/u.parquet")
    config = json.loads((here / "w" / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 0.2


# --- Damaged or foreign things ----------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.indices.npy", lambda b: b[:-4]),
        ("train.indices.npy", lambda b: b""),
        ("test.held_out.indptr.npy", lambda b: b + b"1234"),
        ("train.indptr.npy", lambda b: None),
        ("manifest.json", lambda b: b[: len(b) // 2]),
        ("items.parquet", lambda b: b[:20]),
        ("users.parquet", lambda b: None),
    ],
)
def test_a_damaged_dataset(here, tiny, data_dir, command, name, damage) -> None:
    shutil.copytree(data_dir, here / "data")
    path = here / "data" / name
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    before = listing(here)
    done = command("main", *tiny, "--data_dir=data", "--workdir=w", "--train")
    refused(done, name)
    assert listing(here) == before


@pytest.fixture
def workdir(trained, here) -> pathlib.Path:
    return shutil.copytree(trained.workdir, here / "w")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.model.latent=7", "config.model.latent was 6 and is 7"),
        ("--lr=0.5", "config.optimizer.learning_rate was 0.001 and is 0.5"),
        ("--seed=3", "config.seed was 0 and is 3"),
        ("--amp", "config.precision.policy was 'fp32' and is 'amp'"),
    ],
)
def test_another_config_in_the_workdir(
    trained, workdir, tiny, oracle_dir, command, flag, message
) -> None:
    before = listing(workdir)
    done = command(
        "main",
        *tiny,
        f"--data_dir={oracle_dir}",
        "--workdir=w",
        "--train",
        flag,
    )
    refused(done, message, "workdir w", "another workdir")
    assert listing(workdir) == before


def test_another_model_is_not_tested(workdir, tiny, command) -> None:
    before = listing(workdir)
    done = command("main", "--workdir=w", "--test", "--config.model.latent=7")
    refused(done, "config.model.latent was 6 and is 7")
    assert listing(workdir) == before


@pytest.mark.parametrize("action", ["--train", "--test"])
def test_another_dataset_in_the_workdir(
    workdir, here, tiny, command, action
) -> None:
    made = synthetic.make(
        "synthetic", 9, n_train_users=120, n_held_out_users=20, n_items=40,
        n_groups=4,
    )  # fmt: skip
    write_dataset(here / "other", made)
    before = listing(workdir)
    done = command("main", *tiny, "--data_dir=other", "--workdir=w", action)
    refused(done, "another dataset", "'synthetic'", "other", "arrays")
    assert listing(workdir) == before


def test_a_workdir_in_use(workdir, tiny, oracle_dir, command) -> None:
    hold = (
        "import fcntl, sys\n"
        "lock = open(sys.argv[1], 'a+')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.seek(0); lock.truncate(); lock.write('4711'); lock.flush()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    before = listing(workdir)
    arguments = ("main", "--workdir=w", "--inference_benchmark")
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(workdir / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        refused(command(*arguments), "workdir w is in use by process 4711")
        holder.communicate("")
    assert listing(workdir) == before
    assert command(*arguments).status == 0  # the lock died with its process


@pytest.mark.parametrize(
    "name", ["config.json", "dataset.json", "items.parquet"]
)
def test_a_damaged_workdir(workdir, command, name) -> None:
    path = workdir / name
    path.write_bytes(path.read_bytes()[:10])
    before = listing(workdir)
    refused(command("main", "--workdir=w", "--test"), name)
    assert listing(workdir) == before


def test_a_workdir_without_its_checkpoint(workdir, command) -> None:
    shutil.rmtree(workdir / "checkpoints" / "best")
    before = listing(workdir)
    refused(command("main", "--workdir=w", "--test"), "train first")
    assert listing(workdir) == before


def test_a_damaged_checkpoint(workdir, command) -> None:
    for path in (workdir / "checkpoints" / "best").rglob("manifest.ocdbt"):
        path.write_bytes(path.read_bytes()[:10])
    done = command("main", "--workdir=w", "--test")
    refused(done, "checkpoints/best", "damaged")


def test_no_test_users(here, tiny, command) -> None:
    made = synthetic.make(
        "synthetic",
        n_train_users=120,
        n_held_out_users=0,
        n_items=40,
        n_groups=4,
    )
    write_dataset(here / "data", made)
    assert open_dataset(here / "data").split_sizes == (120, 0, 0)
    before = listing(here)
    done = command(
        "main", *tiny, "--data_dir=data", "--workdir=w", "--train", "--test"
    )
    refused(done, "data: the dataset has no test users", "held_out_users")
    assert listing(here) == before


def test_the_process_itself(here) -> None:
    """The real thing once: status and stderr of `python main.py`."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "experiments" / "main.py"),
            "--train",
            "--workdir=w",
            "--config.model.latnet=3",
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --config.model.latnet: the config has no key 'latnet'; did "
        "you mean latent?\n"
    )
    assert list(here.iterdir()) == []
