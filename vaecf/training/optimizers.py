"""Optimisers by name, and dynamic loss scaling for float16.

To add an optimiser, add an entry to `OPTIMIZERS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vaecf.config import OptimizerConfig, PrecisionConfig
from vaecf.errors import VaecfError, did_you_mean
from vaecf.training.precision import Policy


def _adam(
    config: OptimizerConfig, *, nesterov: bool = False
) -> optax.GradientTransformation:
    return optax.adam(
        config.learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        nesterov=nesterov,
    )


# Values of `config.optimizer.name`. All state must be float32 and belong to
# the parameters one by one, so that it can be sharded like them. An update must
# depend on the entries one by one, because a GPU updates many small arrays as
# one vector (`packed`).
OPTIMIZERS: dict[
    str, Callable[[OptimizerConfig], optax.GradientTransformation]
] = {
    "adam": _adam,  # Kingma & Ba 2015
    "nadam": functools.partial(_adam, nesterov=True),  # Dozat 2016
}


# (group, names of its top-level parameters), for each group.
Groups = tuple[tuple[str, tuple[str, ...]], ...]


def require_known(name: str) -> None:
    """Raises VaecfError unless `OPTIMIZERS` has the name."""
    if name not in OPTIMIZERS:
        raise VaecfError(
            f"config.optimizer.name={name!r} is unknown: use one of "
            f"{', '.join(OPTIMIZERS)}{did_you_mean(name, OPTIMIZERS)}"
        )


def make_optimizer(
    config: OptimizerConfig,
    precision: PrecisionConfig,
    policy: Policy,
    groups: Groups = (),
) -> optax.GradientTransformation:
    """Returns the optimiser of a run, with a loss scale if the policy asks.

    `groups` names the top-level parameters that are trained in alternation, by
    group; without groups all parameters are trained together. Equal settings
    have the same optimiser, so that a program serves all runs of a process that
    could share it.
    """
    settings = (config, precision, policy, groups)
    try:
        return _cached(*settings)
    except TypeError:  # traced settings have no hash
        return _cached.__wrapped__(*settings)


@functools.lru_cache(maxsize=16)
def _cached(
    config: OptimizerConfig,
    precision: PrecisionConfig,
    policy: Policy,
    groups: Groups,
) -> optax.GradientTransformation:
    require_known(config.name)
    optimizer = OPTIMIZERS[config.name](config)
    if groups:
        optimizer = alternating(optimizer, dict(groups))
    if not policy.loss_scaled:
        return optimizer
    return dynamic_loss_scale(
        optimizer,
        precision.initial_loss_scale,
        precision.loss_scale_growth_interval,
    )


def alternating(
    inner: optax.GradientTransformation, groups: Mapping[str, tuple[str, ...]]
) -> optax.GradientTransformation:
    """Returns an optimiser with separate state for each group of parameters.

    Its update takes the gradients of one or more whole groups. The states of
    the other groups (moments and step counts) do not change. `groups` holds the
    names of top-level parameters.
    """

    def part(tree: Any, names: tuple[str, ...]) -> Any:
        return {name: tree[name] for name in names}

    def init(params: Any) -> dict[str, Any]:
        return {
            group: inner.init(part(params, names))
            for group, names in groups.items()
        }

    def update(
        grads: Any, state: dict[str, Any], params: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        updates: dict[str, Any] = {}
        states = dict(state)
        for group, names in groups.items():
            if names[0] in grads:
                own, states[group] = inner.update(
                    part(grads, names),
                    state[group],
                    None if params is None else part(params, names),
                )
                updates |= own
        return updates, states

    return optax.GradientTransformation(init, update)


# --- Loss scale -------------------------------------------------------------

_LARGEST_SCALE = 2.0**24


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`."""

    scale: jax.Array  # float32, factor of the loss (float16 cannot hold 2^16)
    finite_steps: jax.Array  # int32, applied steps since the scale last changed
    skipped: jax.Array  # int32, skipped steps in total
    # int32, steps skipped since the last applied step.
    skipped_in_a_row: jax.Array
    inner: Any  # state of the wrapped optimiser


def dynamic_loss_scale(
    inner: optax.GradientTransformation, initial: float, growth_interval: int
) -> optax.GradientTransformation:
    """Wraps an optimiser so that it takes gradients of scale · loss.

    Float16 gradients below 6e-8 vanish. Multiplying the loss by a large scale
    lifts them into range. The scale doubles after `growth_interval` finite
    steps; when a gradient overflows, the step is skipped and the scale halves
    (Micikevicius et al. 2018, "Mixed precision training", section 3.2). The
    scale stays between 1 and 2^24.

    A skipped step changes neither the parameters nor the inner state. Unlike
    `optax.apply_if_finite`, this wrapper never applies a gradient that is not
    finite, however many come in a row: the training loop checks
    `skipped_in_a_row` and raises a clear error.

    The state is a `LossScaleState`. The gradients must be those of the whole
    mesh, so that all devices skip the same steps.
    """

    def init(params: Any) -> LossScaleState:
        # Separate buffers: each is donated to the first step.
        finite, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        return LossScaleState(
            jnp.float32(initial), finite, skipped, in_a_row, inner.init(params)
        )

    def update(
        scaled_grads: Any, state: LossScaleState, params: Any = None
    ) -> tuple[Any, LossScaleState]:
        grads = jax.tree.map(lambda g: g / state.scale, scaled_grads)
        finite = all_finite(grads)
        updates, inner_state = inner.update(grads, state.inner, params)

        def choose(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        grow = state.finite_steps + 1 >= growth_interval
        grown = jnp.where(
            grow, jnp.minimum(state.scale * 2.0, _LARGEST_SCALE), state.scale
        )
        shrunk = jnp.maximum(state.scale * 0.5, 1.0)
        new_state = LossScaleState(
            scale=jnp.where(finite, grown, shrunk),
            finite_steps=jnp.where(finite & ~grow, state.finite_steps + 1, 0),
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            inner=choose(inner_state, state.inner),
        )
        return choose(updates, jax.tree.map(jnp.zeros_like, updates)), new_state

    return optax.GradientTransformation(init, update)


def all_finite(tree: Any) -> jax.Array:
    """Returns whether no array holds an inf or a NaN, bool scalar."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.stack(flags).all()


def loss_scale_of(opt_state: Any) -> jax.Array:
    """Returns the factor of the loss; 1 without loss scaling."""
    if isinstance(opt_state, LossScaleState):
        return opt_state.scale
    return jnp.float32(1.0)


def skips_of(opt_state: Any) -> jax.Array:
    """Returns the number of skipped steps; 0 without loss scaling."""
    if isinstance(opt_state, LossScaleState):
        return opt_state.skipped
    return jnp.int32(0)
