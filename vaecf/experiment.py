"""One run: train, validate, test and report in one workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data.dataset import Dataset, find_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import baselines, metrics, per_user
from vaecf.evaluation.baselines import ORACLE
from vaecf.evaluation.evaluator import Evaluator
from vaecf.models import registry
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.reporting import recipe_log, report, tables, writers
from vaecf.serving import fit, growth, latency, samples, trained_model
from vaecf.serving.trained_model import TrainedModel
from vaecf.training import linear_branch, optimizers, precision
from vaecf.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Actions:
    """What `run` does."""

    train: bool = False  # or resume training
    test: bool = False  # the best checkpoint, on the test users
    inference_batch_sizes: tuple[int, ...] = ()  # whose latency is measured
    baselines: tuple[str, ...] = ()  # of `BASELINES`, to evaluate in the test
    # Settings of baselines other than the defaults: {'ease': {'l2': 200.0}}.
    settings: Mapping[str, Mapping[str, float]] = dataclasses.field(
        default_factory=dict
    )
    # Choose the settings of the baselines on the validation users.
    baselines_tuned: bool = False
    per_user: pathlib.Path | None = None  # .parquet or .csv, of the test users
    top_results: int = 100  # list length in the measurement of the latency
    trace: bool = False  # profile some steps into workdir/trace
    show_progress: bool | None = None  # None: on a terminal or in a notebook
    log_path: pathlib.Path | None = None  # JSON log in the recipe's format
    # Directory for args.json and statistics.json.
    results_dir: pathlib.Path | None = None
    # The command line, for `log_path` and `results_dir`.
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the stages of a run share."""

    config: Config
    workdir: pathlib.Path
    actions: Actions
    dataset: Dataset
    mesh: Mesh
    validation: Evaluator
    test: Evaluator
    results: dict[str, Any]  # of results.json; each stage replaces its part
    recipe_log: recipe_log.RecipeLogWriter | None
    log: Callable[[str], None]

    @property
    def shown(self) -> dict[str, Any]:
        """Options of training."""
        return {"log": self.log, "show_progress": self.actions.show_progress}

    def note_precision(self, part: str) -> None:
        """Notes the precision of a test, which may not be the training's."""
        policy = precision.policy(self.config.precision.policy).name
        self.results.setdefault("precision", {})[part] = policy

    def within(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Returns a deadline for a stage; see `processes.deadline`."""
        return processes.deadline(self.config.mesh.peer_timeout, what)


def run(
    config: Config,
    workdir: pathlib.Path,
    actions: Actions,
    *,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, tests and reports, as `actions` asks.

    If several processes form the run, all must call this function with the
    same arguments. Only process 0 writes files and logs.

    A run that `workdir` already holds is resumed.

    Returns:
      The content of results.json.

    Raises:
      VaecfError: the input of any process is bad.
      loop.Interrupted: training was interrupted; its state is saved.
    """
    with _opened(config, workdir, actions, log) as run:
        if actions.train:
            _train(run)
        with run.within("loading the model"):
            policy = config.precision.policy
            model = trained_model.load(
                workdir, policy=policy, mesh=run.mesh, refitted=False
            )
        # A test may use other settings than the training did.
        model = dataclasses.replace(model, config=config)
        if actions.train or actions.test:
            model = _validate(run, model)
        chosen = model  # on the validation users, with these results
        model = fit.refit(chosen, run.dataset, train=actions.train, **run.shown)
        run.results["refit"] = model is not chosen
        if actions.test:
            # Fitting and tuning baselines may take longer than any deadline.
            unlimited = contextlib.nullcontext()
            with unlimited if actions.baselines else run.within("the test"):
                _test(run, model)
        if actions.inference_batch_sizes:
            run.results["inference"] = latency.measure_all(
                model,
                actions.inference_batch_sizes,
                k=actions.top_results,
                log=run.log,
            )
            run.note_precision("inference")
        _report(run, model)
    return run.results


def benchmark_untrained(
    config: Config, actions: Actions, *, log: Callable[[str], None] = print
) -> dict[str, float]:
    """Measures the latency of a new model of the configured shape.

    There is no workdir: only `log_path` and `results_dir` are written. Returns
    the figures of `latency.measure`.

    Raises:
      VaecfError: the input is bad.
    """
    _check(config, None, actions)
    dataset = find_dataset(config.data.dir)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    setup = state_lib.make_setup(config, dataset.n_items, mesh)
    writer = _open_outputs(config, actions, mesh)
    params = state_lib.scoring_params(
        setup, state_lib.init_state(setup, config.seed)
    )
    module = registry.make_model(
        config.model,
        precision.policy(config.precision.policy),
        dataset.n_items,
        mesh.shape[mesh_lib.ITEM],
    )
    model = TrainedModel(
        *(config, dataset.manifest, dataset.items, module, mesh, params),
        *(pathlib.Path(), {}),
    )
    log(
        f"no trained model was given: this is an untrained {config.model.name} "
        f"of {dataset.n_items:,} items"
    )
    figures = latency.measure_all(
        model, actions.inference_batch_sizes, k=actions.top_results, log=log
    )
    _write_recipe_files(writer, actions, config, {"inference": figures}, [])
    return figures


# --- Start ------------------------------------------------------------------


@contextlib.contextmanager
def _opened(
    config: Config,
    workdir: pathlib.Path,
    actions: Actions,
    log: Callable[[str], None],
) -> Iterator[_Run]:
    """Checks the input, locks the workdir and yields the run."""
    within = functools.partial(processes.deadline, config.mesh.peer_timeout)
    with within("starting"), processes.agreement():
        _check(config, workdir, actions)
        # Raise what this machine cannot do before anything is written.
        precision.policy(config.precision.policy)
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        dataset = find_dataset(config.data.dir)
        if actions.test and dataset.test.held_out.nnz == 0:
            raise VaecfError(
                f"{config.data.dir}: the dataset has no test users with "
                "held-out items: prepare it with more held_out_users"
            )
    with within("starting"):
        processes.require_same(_common_input(config, dataset, actions))
    with contextlib.ExitStack() as stack:
        recipe_writer = None
        with within("opening the workdir"), processes.agreement():
            if processes.is_lead():
                stack.enter_context(workdir_lib.locked(workdir))
                workdir_lib.check_or_create(
                    workdir, config, dataset, train=actions.train
                )
                if (path := actions.per_user) is not None:
                    workdir_lib.make_folder(path.parent, f"per_user={path}")
                recipe_writer = _open_outputs(config, actions, mesh)
        with within("opening the workdir"), processes.agreement():
            processes.require_shared_directory(workdir)
        path = workdir / workdir_lib.RESULTS
        yield _Run(
            *(config, workdir, actions, dataset, mesh),
            Evaluator.for_split(dataset, "validation", config.eval, mesh),
            Evaluator.for_split(dataset, "test", config.eval, mesh),
            results=workdir_lib.read_json(path) if path.exists() else {},
            recipe_log=recipe_writer,
            log=log if processes.is_lead() else lambda line: None,
        )


def _open_outputs(
    config: Config, actions: Actions, mesh: Mesh
) -> recipe_log.RecipeLogWriter | None:
    """Prepares `results_dir` and returns the writer of `log_path`."""
    if (path := actions.results_dir) is not None:
        workdir_lib.make_folder(path, f"results_dir={path}")
    if actions.log_path is None:
        return None
    writer = recipe_log.RecipeLogWriter(actions.log_path)
    users_at_once = config.train.batch_size // mesh.shape[mesh_lib.DATA]
    sizes = {"world_size": mesh.size, "local_batch_size": users_at_once}
    writer.parameters({**actions.arguments, **sizes})
    return writer


def _check(
    config: Config, workdir: pathlib.Path | None, actions: Actions
) -> None:
    """Raises for input that is bad whatever the dataset is."""
    for name in (*actions.baselines, *actions.settings):
        baselines.settings(name, actions.settings.get(name))
    for name in (*config.eval.metrics, config.eval.best_metric):
        metrics.parse(name)
    optimizers.require_known(config.optimizer.name)
    if actions.train and workdir is not None:
        growth.check(config, workdir)
    is_known = workdir is None or (workdir / workdir_lib.CONFIG).exists()
    if not actions.train and not is_known:
        raise VaecfError(
            f"workdir {workdir} holds no trained model: train first"
        )
    if actions.inference_batch_sizes and not processes.alone():
        raise VaecfError(
            "the inference benchmark measures a single process: run it with "
            "num_processes=1"
        )


def _common_input(
    config: Config, dataset: Dataset, actions: Actions
) -> dict[str, Any]:
    """Returns the input that must be the same in all processes, by name."""
    settings = config.flat()
    del settings["data.dir"]  # every host may have its own copy
    names = ("train", "test", "baselines", "baselines_tuned", "trace")
    return {
        **{f"config.{key}": value for key, value in settings.items()},
        "dataset": dataset.manifest,
        **{name: getattr(actions, name) for name in names},
        "baseline settings": actions.settings,
    }


# --- Stages -----------------------------------------------------------------


def _train(run: _Run) -> None:
    """Sets results['train'] and drops the results of an earlier model."""
    config, dataset = run.config, run.dataset
    policy = precision.policy(config.precision.policy)
    how = (
        f"; batches of {config.train.batch_size:,}, {policy.name}, "
        f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    )
    run.log(
        f"training {config.title} on {dataset.about}: "
        f"{dataset.train.n_users:,} users, {dataset.n_items:,} items, "
        f"{dataset.train.nnz:,} interactions{'' if config.is_fitted else how}"
    )
    began = time.perf_counter()
    trace_dir = run.workdir / "trace" if run.actions.trace else None
    summary = fit.train(
        *(config, dataset, run.workdir),
        extra_writer=run.recipe_log,
        trace_dir=trace_dir,
        **run.shown,
    )
    if summary["epochs"] != run.results.get("train", {}).get("epochs"):
        run.results.clear()
        if processes.is_lead():
            (run.workdir / workdir_lib.PER_USER).unlink(missing_ok=True)
    run.results["train"] = summary
    elapsed = time.perf_counter() - began
    if run.recipe_log is not None:
        run.recipe_log.elapsed_seconds = elapsed
    if summary["users_per_second"] is not None:
        run.log(
            f"trained {summary['epochs']} epochs in {summary['seconds']:.1f} s "
            f"of steps ({summary['users_per_second']:,.0f} users/s); this call "
            f"took {elapsed:.1f} s with validations, "
            f"checkpoints and {summary['compile_seconds']:.1f} s of "
            f"compilation; best epoch {summary['best_epoch']}"
        )
    if trace_dir is not None and not trace_dir.exists():
        run.log("trace: training was too short to profile")


def _validate(run: _Run, model: TrainedModel) -> TrainedModel:
    """Sets results['validation'] and returns the model with tuned weights."""
    if run.validation.is_empty:
        model = fit.with_earlier_weights(model)
    model = trained_model.tune_blend(model, run.validation, log=run.log)
    run.results.pop("linear", None)
    if model.branch is not None:
        run.results["linear"] = linear_branch.weights_of(model.branch)
    with run.within("a validation"):
        run.results["validation"] = run.validation(
            model.ranker(run.validation.depth), model.scorer_params
        ).summary
    run.note_precision("validation")
    return model


def _test(run: _Run, model: TrainedModel) -> None:
    """Sets results['test'] and the baselines; writes per-user metrics."""
    results, dataset, log = run.results, run.dataset, run.log
    for key in ("history_length", "item_popularity", ORACLE):
        results.pop(key, None)  # an earlier test may have had other metrics
    evaluation = run.test(model.ranker(run.test.depth), model.scorer_params)
    results["test"] = evaluation.summary
    run.note_precision("test")
    results["users_left_out"] = evaluation.left_out
    results.update(run.test.groups(evaluation))
    if dataset.oracle is not None:
        results[ORACLE] = baselines.evaluate_oracle(
            dataset, run.validation, run.test
        )
    title = run.config.title
    path = run.workdir / workdir_lib.PER_USER
    frames = {title: per_user.frame(title, evaluation, dataset)}
    frames |= baselines.keep_earlier(results, frames[title], path, log=log)

    def save_partial_results() -> None:
        """Saves what is known before the next baseline, which may take long."""
        if not processes.is_lead():
            return
        file = run.workdir / workdir_lib.RESULTS
        workdir_lib.write_json(file, results, digest=True)
        for file in filter(None, (path, run.actions.per_user)):
            per_user.write(file, frames.values())

    save_partial_results()
    for name in run.actions.baselines:
        result, on_test = baselines.evaluate(
            name,
            run.validation,
            run.test,
            changes=run.actions.settings.get(name),
            tuned=run.actions.baselines_tuned,
            log=log,
        )
        if name in results:
            frames.pop(baselines.label(name, results[name]), None)
        results[name] = result
        label = baselines.label(name, result)
        frames[label] = per_user.frame(label, on_test, dataset)
        save_partial_results()
    table = tables.results_table(
        tables.results_rows(baselines.grouped(results), name=title),
        protocol=dataset.protocol,
        dataset=dataset.name,
        users_left_out=evaluation.left_out,
        references=(ORACLE,),
    )
    log(f"\n{table}")
    if ORACLE in results:
        log(baselines.ORACLE_NOTE)


def _report(run: _Run, model: TrainedModel) -> None:
    """Writes results.json, report.html and the files of the recipe."""
    # All processes wait here: JAX's runtime takes one that exits much later
    # than the others for dead.
    with run.within("the report"), processes.agreement():
        shown = samples.sample_recommendations(model, run.dataset)
        if not processes.is_lead():
            return
        results_path = run.workdir / workdir_lib.RESULTS
        report_path = run.workdir / workdir_lib.REPORT
        metrics_path = run.workdir / workdir_lib.METRICS
        # A run of zero epochs has no metrics.
        has_metrics = metrics_path.exists()
        records = writers.read_records(metrics_path) if has_metrics else []
        workdir_lib.write_json(results_path, run.results, digest=True)
        report.write_report(
            report_path,
            config=run.config.to_dict(),
            dataset={
                "name": run.dataset.name,
                "protocol": run.dataset.protocol,
                **run.dataset.manifest.get("protocol_constants", {}),
                **run.dataset.manifest.get("counts", {}),
            },
            records=records,
            results=baselines.grouped(run.results),
            environment=report.environment(run.mesh.devices.flat),
            recommendations=shown,
            model=run.config.title,
            metric=run.config.eval.best_metric,
        )
        run.log(f"\nreport: {report_path}\nresults: {results_path}")
        _write_recipe_files(
            run.recipe_log, run.actions, run.config, run.results, records
        )


def _write_recipe_files(
    writer: recipe_log.RecipeLogWriter | None,
    actions: Actions,
    config: Config,
    results: Mapping[str, Any],
    records: Sequence[writers.Record],
) -> None:
    """Writes the last line of `log_path`, and the files of `results_dir`."""
    if writer is not None:
        measured = results["inference"] if actions.inference_batch_sizes else {}
        figures = {k: (value, latency.unit(k)) for k, value in measured.items()}
        for name, cell in results["test"].items() if actions.test else ():
            figures[f"test_{name}"] = cell["mean"], "1"
        writer.final(figures, warm_up_epochs=config.train.warm_up_epochs)
    if (folder := actions.results_dir) is not None:
        recipe_log.write_statistics(folder, actions.arguments, results, records)
