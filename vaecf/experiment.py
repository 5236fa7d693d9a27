"""A run from the outside: train, test, compare, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vaecf import workdir as workdir_lib
from vaecf.config import Config, flatten
from vaecf.data.dataset import Dataset, find_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import baselines, evaluator, metrics, per_user
from vaecf.evaluation.baselines import BASELINES
from vaecf.evaluation.evaluator import Evaluator
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.reporting import report, tables, writers
from vaecf.reporting.recipe_log import RecipeLogWriter
from vaecf.serving import latency
from vaecf.serving.trained_model import TrainedModel, load, tune_blend
from vaecf.training import loop, precision

# The oracle's name in results.json and in tables.
ORACLE = "oracle"
# Shown in the report: few enough to read.
_SHOWN_USERS, _SHOWN_ITEMS = 3, 10
# For what one process writes to be seen by the others.
_SHARED_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Actions:
    """What a call of the main entry point asks for.

    Attributes:
      train: train, or go on training.
      test: evaluate the best checkpoint on the test users.
      inference_batch_sizes: measure the latency of these; () for none.
      baselines: names out of `BASELINES`, evaluated beside the model.
      settings: settings of baselines other than the defaults, such as
        {'ease': {'l2': 200.0}}.
      baselines_tuned: choose their settings on the validation users.
      per_user: also write per-user metrics to this Parquet file.
      top_results: list length of the inference benchmark.
      trace: profile some steps into the workdir.
      log_path: JSON log in the recipe's form.
      results_dir: also write args.json and statistics.json there.
      arguments: the command line, for those two.
    """

    train: bool = False
    test: bool = False
    inference_batch_sizes: tuple[int, ...] = ()
    baselines: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, float]] = dataclasses.field(
        default_factory=dict
    )
    baselines_tuned: bool = False
    per_user: pathlib.Path | None = None
    top_results: int = 100
    trace: bool = False
    log_path: pathlib.Path | None = None
    results_dir: pathlib.Path | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run(
    config: Config,
    workdir: pathlib.Path,
    actions: Actions,
    *,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Does what `actions` asks, in its order; returns what results.json holds.

    Of several processes all call it alike; the lead writes and says, and alone
    knows of baselines of earlier calls.

    Raises:
      VaecfError: bad input, of any process; nothing is half-written.
      loop.Interrupted: training was stopped, its state is saved.
    """
    within = functools.partial(processes.deadline, config.mesh.peer_timeout)
    with within("starting"), processes.agreement():
        _check_actions(config, workdir, actions)
        # What this machine cannot do is refused before anything is written.
        precision.policy(config.precision.policy)
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        dataset = find_dataset(config.data.dir)
        if actions.test and dataset.test.held_out.nnz == 0:
            n_users = dataset.test.fold_in.n_users
            why = (
                f"none of its {n_users:,} test users has a held-out item that "
                "training users have; prepare it with more held-out users"
                if n_users
                else "the dataset has no test users; prepare it with "
                "held_out_users above 0"
            )
            raise VaecfError(f"{config.data.dir}: {why}")
    with within("starting"):
        processes.require_same(_alike(config, dataset, actions))
    if not processes.is_lead():
        log = _silent
    with contextlib.ExitStack() as stack:
        recipe_log = None
        with within("opening the workdir"), processes.agreement():
            if processes.is_lead():
                stack.enter_context(workdir_lib.locked(workdir))
                workdir_lib.check_or_create(
                    workdir, config, dataset, train=actions.train
                )
                _make_folders(actions)
                if actions.log_path is not None:
                    recipe_log = stack.enter_context(
                        RecipeLogWriter(actions.log_path)
                    )
                    recipe_log.parameters(actions.arguments)
        with within("opening the workdir"), processes.agreement():
            _check_shared(workdir)
        results = _results_so_far(workdir)
        if actions.train:
            log(_start_line(config, dataset, mesh))
            _train(results, config, dataset, workdir, actions, recipe_log, log)
        with within("reading the model"):
            model = load(workdir, policy=config.precision.policy, mesh=mesh)
        # How to evaluate is this call's choice, not that of the training.
        model = dataclasses.replace(model, config=config)
        validation, test = (
            Evaluator.for_split(dataset, split, config.eval, mesh)
            for split in ("validation", "test")
        )
        if actions.train or actions.test:
            model = tune_blend(model, validation, log=log)
            results.pop("linear", None)
            if model.branch is not None:
                weights = ("gain", "prior")
                results["linear"] = {w: float(model.branch[w]) for w in weights}
            with within("a validation"):
                results["validation"] = validation.summary(
                    model.ranker(validation.depth), model.scorer_params
                )
        if actions.test:
            # Fitting and tuning baselines takes what it takes.
            patience = (
                contextlib.nullcontext()
                if actions.baselines
                else within("the test")
            )
            with patience:
                _test(
                    *(results, model, dataset, workdir),
                    *(validation, test, actions, log),
                )
        if actions.inference_batch_sizes:
            results["inference"] = _measure_latency(model, actions, log)
        with within("the report"), processes.agreement():
            # The others wait: the runtime takes who leaves late for dead.
            shown = sample_recommendations(model, dataset)
            if processes.is_lead():
                workdir_lib.write_json(workdir / workdir_lib.RESULTS, results)
                _finish_log(recipe_log, results, config, actions)
                _write_report(workdir, model, dataset, results, shown, log)
                if actions.results_dir is not None:
                    _write_statistics(actions, workdir, results)
    return results


def _alike(
    config: Config, dataset: Dataset, actions: Actions
) -> dict[str, Any]:
    """What all processes of a run must have been given."""
    flat = flatten(config.to_dict())
    del flat["data.dir"]  # a copy on every host will do
    return {
        **{f"config.{key}": value for key, value in flat.items()},
        "dataset": dataset.manifest,
        **{
            name: getattr(actions, name)
            for name in (
                "train",
                "test",
                "baselines",
                "baselines_tuned",
                "trace",
            )
        },
        "baseline settings": actions.settings,
    }


def _check_shared(workdir: pathlib.Path) -> None:
    """All processes must see one workdir.

    Raises:
      VaecfError: this one does not see what the lead writes.
    """
    if processes.alone():
        return
    token = os.urandom(8)
    token = processes.gather(np.frombuffer(token, np.uint32))[0].tobytes()
    path = workdir / ".processes"
    if processes.is_lead():
        path.write_bytes(token)
    began, seen = time.monotonic(), False
    # A network's file system may show it a little later.
    while not seen and time.monotonic() - began < _SHARED_SECONDS:
        seen = path.exists() and path.read_bytes() == token
        time.sleep(0.0 if seen else 0.1)
    processes.gather(True)  # all have looked
    if processes.is_lead():
        path.unlink(missing_ok=True)
    if not seen:
        raise VaecfError(
            f"workdir {workdir} is another directory here than that of "
            "process 0: give all processes the same one, on a file system "
            "that they share"
        )


def _silent(message: str) -> None:
    """What the processes beside the lead say."""


def _check_actions(
    config: Config, workdir: pathlib.Path, actions: Actions
) -> None:
    """Refuses what needs no data to be refused.

    Raises:
      VaecfError: see `run`.
    """
    for name in (*actions.baselines, *actions.settings):
        baselines.settings(name, actions.settings.get(name))
    for name in (*config.eval.metrics, config.eval.best_metric):
        metrics.parse(name)
    if not actions.train and not (workdir / workdir_lib.CONFIG).exists():
        raise VaecfError(
            f"workdir {workdir} holds no trained model: train first"
        )
    if actions.inference_batch_sizes and not processes.alone():
        raise VaecfError(
            "the latency of inference is measured in one process: run it with "
            "num_processes=1"
        )


def _train(
    results: dict[str, Any],
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    actions: Actions,
    recipe_log: RecipeLogWriter | None,
    log: Callable[[str], None],
) -> None:
    """Fills results['train']; what was measured of an earlier model goes."""
    began = time.perf_counter()
    summary = loop.train(
        config,
        dataset,
        workdir,
        extra_writer=recipe_log,
        trace_dir=workdir / "trace" if actions.trace else None,
        log=log,
    ).summary
    if summary["epochs"] != results.get("train", {}).get("epochs"):
        results.clear()
        if processes.is_lead():
            (workdir / workdir_lib.PER_USER).unlink(missing_ok=True)
    results["train"] = summary
    log(_training_line(summary, time.perf_counter() - began))
    if actions.trace and not (workdir / "trace").exists():
        log("trace: training was too short to be profiled")


def _make_folders(actions: Actions) -> None:
    """Folders of what is written outside the workdir, before the work."""
    folders = {
        "per_user": actions.per_user and actions.per_user.parent,
        "results_dir": actions.results_dir,
    }
    for flag, folder in folders.items():
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VaecfError(
                f"{flag}={getattr(actions, flag)} cannot be written "
                f"({error.strerror})"
            ) from error
        if folder is not None and not os.access(folder, os.W_OK):
            raise VaecfError(
                f"{flag}={getattr(actions, flag)} cannot be written "
                "(permission denied)"
            )


def _results_so_far(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / workdir_lib.RESULTS
    return workdir_lib.read_json(path) if path.exists() else {}


def _start_line(config: Config, dataset: Dataset, mesh: Any) -> str:
    name = precision.policy(config.precision.policy).name
    return (
        f"training {config.title} on {dataset.name}: "
        f"{dataset.train.n_users:,} users, {dataset.n_items:,} items, "
        f"{dataset.train.nnz:,} interactions; batches of "
        f"{config.train.batch_size:,}, {name}, {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind}"
    )


def _training_line(summary: Mapping[str, Any], seconds: float) -> str:
    speed = summary["users_per_second"]
    if speed is None:
        return "nothing left to train"
    return (
        f"trained {summary['epochs']} epochs in {summary['seconds']:.1f} s of "
        f"steps ({speed:,.0f} users/s); {seconds:.1f} s in this call with "
        f"validations, checkpoints and {summary['compile_seconds']:.1f} s of "
        f"compilation; best epoch {summary['best_epoch']}"
    )


def _test(
    results: dict[str, Any],
    model: TrainedModel,
    dataset: Dataset,
    workdir: pathlib.Path,
    validation: Evaluator,
    test: Evaluator,
    actions: Actions,
    log: Callable[[str], None],
) -> None:
    """Fills results['test'] and the baselines; per_user.parquet; a table."""
    for key in ("history_length", ORACLE):
        results.pop(key, None)  # of an earlier call's metrics
    evaluation = test(model.ranker(test.depth), model.scorer_params)
    assert evaluation is not None  # `run` refuses a dataset without any
    results["test"] = evaluation.summary
    results["users_left_out"] = evaluation.left_out
    metric = model.config.eval.best_metric
    if metric in evaluation.per_user:
        results["history_length"] = evaluator.by_history_length(
            evaluation.per_user[metric], dataset.test.fold_in.counts
        )
    if dataset.oracle is not None:
        results[ORACLE] = {
            split: baselines.evaluate_oracle(dataset, split, evaluator)
            for split, evaluator in (("validation", validation), ("test", test))
        }
    title = model.config.title
    frames = {title: per_user.frame(title, evaluation, dataset)}
    frames |= baselines.keep_earlier(
        results, frames[title], workdir / workdir_lib.PER_USER, log=log
    )

    def leave() -> None:
        """What is known so far, for whoever stops what takes long."""
        if not processes.is_lead():
            return
        workdir_lib.write_json(workdir / workdir_lib.RESULTS, results)
        for path in (workdir / workdir_lib.PER_USER, actions.per_user):
            if path is not None:
                per_user.write(path, frames.values())

    leave()
    for name in actions.baselines:
        result, its = baselines.evaluate(
            name,
            validation,
            test,
            changes=actions.settings.get(name),
            tuned=actions.baselines_tuned,
            log=log,
        )
        if name in results:
            frames.pop(baselines.label(name, results[name]), None)
        results[name] = result
        if its is not None:
            label = baselines.label(name, result)
            frames[label] = per_user.frame(label, its, dataset)
        leave()
        if (line := baselines.tuned_line(name, result)) is not None:
            log(line)
    log("")
    log(
        tables.results_table(
            tables.results_rows(for_report(results), name=title),
            title="Test users",
            protocol=dataset.protocol,
            dataset=dataset.name,
            users_left_out=evaluation.left_out,
            references=(ORACLE,),
            footnote=(
                f"{ORACLE}: ranking by the probabilities that generated the "
                "data, the best that a model can reach"
                if ORACLE in results
                else None
            ),
        )
    )


# --- Inference ------------------------------------------------------------


def _measure_latency(
    model: TrainedModel, actions: Actions, log: Callable[[str], None]
) -> dict[str, float]:
    figures: dict[str, float] = {}
    for batch_size in actions.inference_batch_sizes:
        figures.update(
            latency.measure(model, batch_size=batch_size, k=actions.top_results)
        )
    for name, value in figures.items():
        log(f"{name}: {value:.6g} {_latency_unit(name)}")
    return figures


def _latency_unit(name: str) -> str:
    return "users/s" if name.endswith("throughput") else "s"


# --- What a run leaves behind ---------------------------------------------


def _finish_log(
    recipe_log: RecipeLogWriter | None,
    results: Mapping[str, Any],
    config: Config,
    actions: Actions,
) -> None:
    """Logs what this call measured."""
    if recipe_log is None:
        return
    final: dict[str, Any] = {}
    units: dict[str, str] = {}
    if actions.inference_batch_sizes:
        for name, value in results["inference"].items():
            final[name], units[name] = value, _latency_unit(name)
    if actions.test:
        for name, value in results["test"].items():
            final[f"test_{name}"], units[f"test_{name}"] = value["mean"], "1"
    recipe_log.final(
        final, warm_up_epochs=config.train.warm_up_epochs, units=units
    )


def _write_statistics(
    actions: Actions, workdir: pathlib.Path, results: Mapping[str, Any]
) -> None:
    """The recipe's --results_dir."""
    assert actions.results_dir is not None
    history: dict[str, list[Any]] = {}
    for record in _records(workdir):
        for name, value in record.items():
            if "/" in name:
                history.setdefault(name, []).append(value)
    workdir_lib.write_json(
        actions.results_dir / "args.json", dict(actions.arguments)
    )
    workdir_lib.write_json(
        actions.results_dir / "statistics.json",
        {"results": results, "history": history},
    )


def _records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; none of a run without an epoch."""
    path = workdir / "metrics.jsonl"
    return writers.read_records(path) if path.exists() else []


def for_report(results: Mapping[str, Any]) -> dict[str, Any]:
    """results.json's content with baselines and oracle in groups."""
    keys = ("train", "validation", "test", "history_length", "linear")
    grouped = {key: results[key] for key in keys if key in results}
    if "test" in grouped and "users_left_out" in results:
        left_out = results["users_left_out"]
        grouped["test"] = {**grouped["test"], "users_left_out": left_out}
    grouped["baselines"] = {
        baselines.label(n, results[n]): results[n]
        for n in BASELINES
        if n in results
    }
    grouped["references"] = (
        {ORACLE: results[ORACLE]} if ORACLE in results else {}
    )
    return grouped


def environment() -> dict[str, str]:
    """Versions and devices, for reports and benchmarks."""
    import importlib.metadata

    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform": platform.platform(),
    }


def _write_report(
    workdir: pathlib.Path,
    model: TrainedModel,
    dataset: Dataset,
    results: Mapping[str, Any],
    recommendations: list[dict[str, Any]],
    log: Callable[[str], None],
) -> None:
    path = workdir / "report.html"
    report.write_report(
        path,
        title=f"{model.config.title} on {dataset.name}",
        config=model.config.to_dict(),
        dataset={
            "name": dataset.name,
            "protocol": dataset.protocol,
            **dataset.manifest.get("counts", {}),
        },
        records=_records(workdir),
        results=for_report(results),
        environment=environment(),
        recommendations=recommendations,
        model_name=model.config.title,
        metric=model.config.eval.best_metric,
    )
    log(f"\nreport: {path}\nresults: {workdir / workdir_lib.RESULTS}")


def sample_recommendations(
    model: TrainedModel, dataset: Dataset
) -> list[dict[str, Any]]:
    """Ten recommendations for the first test users, by raw ids."""
    held = dataset.split("test")
    n = min(_SHOWN_USERS, held.fold_in.n_users)
    if n == 0:
        return []
    fold_in = held.fold_in.rows(np.arange(n))
    ranked = model.ranker(min(_SHOWN_ITEMS, dataset.n_items))(
        model.scorer_params, fold_in.indptr, fold_in.indices, batch_size=n
    )
    first = dataset.split_sizes[0] + dataset.split_sizes[1]
    log_probability = ranked.score_UK - ranked.log_total_U[:, None]
    return [
        {
            "user": dataset.users.ids[first + u],
            "history": [dataset.items.ids[i] for i in fold_in.row(u)],
            "rows": [
                {
                    "rank": rank + 1,
                    "item": dataset.items.ids[item],
                    "score": float(log_probability[u, rank]),
                }
                for rank, item in enumerate(ranked.item_UK[u])
                if item >= 0
            ],
        }
        for u in range(n)
    ]
