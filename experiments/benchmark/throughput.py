"""Users a second through the real training step, beside ceiling and peers."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments.benchmark import ceilings, machine, models, peers
from experiments.benchmark.trainer import OWN, Own, Trainer
from vaecf.config import Config
from vaecf.data import synthetic
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import scorers
from vaecf.evaluation.evaluator import Evaluator
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import precision
from vaecf.training import state as state_lib

_SHAPES = {"ml-20m": "ml-20m-shape", "synthetic": "synthetic"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the flags of `training.py`, None for the shape's."""

    shape: str
    users: int | None
    items: int | None
    hidden: tuple[int, ...]
    latent: int
    batch_size: int
    precision: str
    input: str
    feed: str
    item_block: int
    microbatch: int
    mesh_data: int
    mesh_item: int
    seconds: float
    repeats: int
    peers: tuple[str, ...]
    peer_python: str
    evaluated_users: int
    seed: int

    @property
    def turn(self) -> float:
        """Seconds for one thing in one turn."""
        return self.seconds / self.repeats


def benchmark(settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """Generates, compiles, measures in turns.

    Args:
      settings: what.
      log: gets lines of text on the way.

    Returns:
      What the JSON holds; see the module and `_result`.

    Raises:
      VaecfError: settings that do not fit, or a peer that cannot run.
    """
    beside_itself = OWN in settings.peers
    foreign = tuple(name for name in settings.peers if name != OWN)
    settings = dataclasses.replace(settings, peers=foreign)
    peers.check(settings.peers, settings.peer_python)
    config = _options(settings)
    # Before the seconds of generation: a policy that this device lacks.
    policy = precision.policy(settings.precision)
    mesh = mesh_lib.make_mesh(settings.mesh_data, settings.mesh_item)
    dataset = _generate(settings)
    train = dataset.train
    log(
        f"{train.n_users:,} training users, {dataset.n_items:,} items, "
        f"{train.nnz:,} interactions"
    )
    if train.n_users < settings.batch_size:
        raise VaecfError(
            f"--batch_size={settings.batch_size} is larger than the "
            f"{train.n_users} training users: lower it or raise --users"
        )
    generated_rss = machine.peak_rss_bytes()
    copy_rate = ceilings.copy_bandwidth(min(1.0, settings.turn))
    product = ceilings.make_product(
        mesh, policy, settings.batch_size, settings.hidden[0], dataset.n_items
    )
    setup = state_lib.make_setup(config, dataset.n_items, mesh)
    trainer = Trainer(config, setup, train)
    log(f"compiled in {trainer.compile_seconds:.1f} s")
    with contextlib.ExitStack() as stack:
        others: list[peers.Peer | Own] = list(
            _start_peers(settings, dataset, stack, log)
        )
        if beside_itself:
            others.append(Own(config, dataset))
            log(f"{OWN} is ready")
        rounds = [
            _turn(settings, product, trainer, others, dataset.n_items, log)
            for _ in range(settings.repeats)
        ]
        facts = {peer.name: peer.facts for peer in others}
    evaluation = None
    if settings.evaluated_users:
        evaluation = _evaluate(config, setup, trainer.params, dataset)
    return {
        **_result(settings, dataset, rounds),
        **models.describe(policy, mesh),
        "input": setup.model.input_lowering,
        "item_block": setup.model.item_block,
        "microbatch": setup.microbatch,
        "input_asked": settings.input,
        "feed": settings.feed,
        "ceiling_shape": list(product.shape),
        "copy_gb_per_second": copy_rate / 1e9,
        "interactions_per_user": trainer.interactions_per_user,
        "compile_seconds": trainer.compile_seconds,
        "program_bytes": trainer.program_bytes,
        "steps_timed": trainer.steps_timed,
        "loss_first": trainer.losses[0],
        "loss_last": trainer.losses[-1],
        "optimizer_bytes_per_step": _optimizer_bytes(trainer.params),
        "evaluation": evaluation,
        "seconds_for_400_epochs": 400
        * dataset.train.n_users
        / statistics.median(turn["users_per_second"] for turn in rounds),
        "peers": _peers_result(rounds, facts),
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "peak_rss_bytes_of_generation": generated_rss,
        "device_memory": models.device_memory(),
        "rounds": rounds,
    }


def table(result: dict[str, Any]) -> str:
    """A few lines for the person."""
    lines = [
        f"{result['device']}, {result['precision']}, batch "
        f"{result['batch_size']:,}, {result['input']} input",
        f"vaecf               {result['users_per_second']:>12,.0f} users/s",
        f"ceiling             {result['ceiling_gflops']:>12,.1f} GFLOP/s",
        f"fraction of ceiling {result['fraction_of_ceiling']:>12.1%}",
        f"memory of the step  {result['program_bytes'] / 1e9:>12.2f} GB",
        f"peak memory (host)  {result['peak_rss_bytes'] / 1e9:>12.2f} GB",
    ]
    if result["evaluation"]:
        seconds = result["evaluation"]["seconds"]
        lines.append(f"evaluation          {seconds:>12.2f} s")
    for name, peer in result["peers"].items():
        lines.append(
            f"{name:<19} {peer['users_per_second']:>12,.0f} users/s, "
            f"vaecf is {peer['ratio']:.2f} x as fast; "
            f"{peer['peak_rss_bytes'] / 1e9:.2f} GB"
        )
    return "\n".join(lines)


def _options(settings: Settings) -> Config:
    if not settings.hidden:
        raise VaecfError("--hidden must name at least one width")
    return models.paper_config(
        {
            "seed": settings.seed,
            "data.feed": settings.feed,
            "model.hidden": settings.hidden,
            "model.latent": settings.latent,
            "model.input": settings.input,
            "model.item_block": settings.item_block,
            "train.batch_size": settings.batch_size,
            "train.microbatch": settings.microbatch,
            "precision.policy": settings.precision,
            "mesh.data": settings.mesh_data,
            "mesh.item": settings.mesh_item,
        }
    )


def _generate(settings: Settings) -> Dataset:
    overrides: dict[str, int] = {"n_held_out_users": settings.evaluated_users}
    if settings.users is not None:
        overrides["n_train_users"] = settings.users
    if settings.items is not None:
        overrides["n_items"] = settings.items
    return synthetic.make(
        _SHAPES[settings.shape], seed=settings.seed, **overrides
    )


def _start_peers(
    settings: Settings,
    dataset: Dataset,
    stack: contextlib.ExitStack,
    log: Callable[[str], None],
) -> list[peers.Peer]:
    """The peers asked for, warmed up; `stack` ends them."""
    if not settings.peers:
        return []
    directory = pathlib.Path(
        stack.enter_context(tempfile.TemporaryDirectory(prefix="vaecf-peers-"))
    )
    peers.write_data(directory, dataset.train)
    started = []
    for name in settings.peers:
        peer = peers.Peer(
            name,
            settings.peer_python,
            directory,
            n_items=dataset.n_items,
            hidden=settings.hidden,
            latent=settings.latent,
            batch_size=settings.batch_size,
        )
        started.append(stack.enter_context(peer))
        log(f"{name} is ready")
    return started


def _turn(
    settings: Settings,
    product: ceilings.Product,
    trainer: Trainer,
    others: list[peers.Peer | Own],
    n_items: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Ceiling, training, ceiling, peers: one line of the record."""
    timings = product.measure(settings.turn / 2)
    users_per_second = trainer.measure(settings.turn)
    timings += product.measure(settings.turn / 2)
    ceiling = statistics.median(timings)
    floor = ceilings.flop_floor(settings.hidden[0], n_items)
    turn: dict[str, Any] = {
        "ceiling_gflops": ceiling / 1e9,
        "ceiling_gflops_best": max(timings) / 1e9,
        "users_per_second": users_per_second,
        "fraction_of_ceiling": users_per_second * floor / ceiling,
        "peers": {},
    }
    for peer in others:
        answer = peer.measure(settings.turn)
        rate = answer["users"] / answer["seconds"]
        turn["peers"][peer.name] = {**answer, "users_per_second": rate}
    said = ", ".join(
        f"{name} {answer['users_per_second']:,.0f}"
        for name, answer in turn["peers"].items()
    )
    log(
        f"ceiling {ceiling / 1e9:,.1f} GFLOP/s, vaecf "
        f"{users_per_second:,.0f} users/s"
        f" ({turn['fraction_of_ceiling']:.1%}){', ' if said else ''}{said}"
    )
    return turn


def _median(rounds: list[dict[str, Any]], key: str) -> float:
    return statistics.median(turn[key] for turn in rounds)


def _result(
    settings: Settings, dataset: Dataset, rounds: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures: medians over the turns, and the fraction of the two."""
    floor = ceilings.flop_floor(settings.hidden[0], dataset.n_items)
    users_per_second = _median(rounds, "users_per_second")
    ceiling_gflops = _median(rounds, "ceiling_gflops")
    return {
        "users_per_second": users_per_second,
        "ceiling_gflops": ceiling_gflops,
        "ceiling_gflops_best": max(t["ceiling_gflops_best"] for t in rounds),
        "fraction_of_ceiling": users_per_second
        * floor
        / (ceiling_gflops * 1e9),
        "batch_size": settings.batch_size,
        "shape": settings.shape,
        "items": dataset.n_items,
        "users": dataset.train.n_users,
        "interactions": dataset.train.nnz,
        "hidden": list(settings.hidden),
        "latent": settings.latent,
        "floor": {
            "flop_per_user": floor,
            "description": (
                "three decoder products (logits, gradient of the hidden layer, "
                "gradient of the weights): 3 x 2 x hidden x items"
            ),
        },
        "seconds": settings.seconds,
        "repeats": settings.repeats,
    }


def _optimizer_bytes(params: Any) -> int:
    """Least traffic of Adam: reads w, m, v and g, writes w, m and v."""
    return 7 * sum(x.nbytes for x in jax.tree.leaves(params))


def _evaluate(
    config: Config, setup: state_lib.TrainSetup, params: Any, dataset: Dataset
) -> dict[str, Any]:
    """Ranks and scores the validation users, as the loop does; timed warm."""
    held = dataset.validation
    evaluation = dataclasses.replace(
        config.eval, metrics=models.METRICS, best_metric=models.METRICS[0]
    )
    validation = Evaluator.for_split(
        dataset, "validation", evaluation, setup.mesh
    )
    ranker = validation.compile(scorers.model(setup.model))
    for _ in range(2):
        began = time.perf_counter()
        summary = validation.summary(ranker, scorers.ModelParams(params))
        seconds = time.perf_counter() - began
    return {
        "users": held.fold_in.n_users,
        "seconds": seconds,
        "users_per_second": held.fold_in.n_users / seconds,
        "batch_size": config.eval.batch_size,
        "ndcg@100": summary["ndcg@100"]["mean"],
    }


def _peers_result(
    rounds: list[dict[str, Any]], facts: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Medians over the turns; the ratio is that of the same turn."""
    result = {}
    for name, fact in facts.items():
        answers = [turn["peers"][name] for turn in rounds]
        rates = [answer["users_per_second"] for answer in answers]
        ratios = [
            turn["users_per_second"] / rate for turn, rate in zip(rounds, rates)
        ]
        result[name] = {
            **fact,
            "users_per_second": statistics.median(rates),
            "ratio": statistics.median(ratios),
            "peak_rss_bytes": answers[-1]["peak_rss_bytes"],
            "peak_device_bytes": answers[-1].get("peak_device_bytes"),
            "first_loss": answers[0]["first_loss"],
            "loss": answers[-1]["loss"],
        }
    return result
