"""Dynamic loss scaling as an optax wrapper.

Float16 gradients below 6e-8 vanish. Multiplying the loss by a large scale
lifts them into range, dividing the gradients brings them back; the scale
grows while all goes well and shrinks, skipping the update, when a gradient
overflows (Micikevicius et al. 2018, "Mixed precision training", section 3.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
      scale: float32, what the loss is multiplied by (float16 cannot hold
        2^16).
      finite_steps: int32, applied steps since the scale last changed.
      skipped: int32, steps skipped in all.
      skipped_in_a_row: int32, steps skipped since the last applied one.
      inner: state of the wrapped transformation.
    """

    scale: jax.Array
    finite_steps: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    inner: Any


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    growth_factor: float = 2.0,
    growth_interval: int = 2000,
    backoff_factor: float = 0.5,
    floor: float = 1.0,
    ceiling: float = 2.0**24,
) -> optax.GradientTransformation:
    """Wraps an optimiser so that it takes gradients of scale · loss.

    A step with a gradient that is not finite leaves the parameters and the
    inner state as they are. Unlike `optax.apply_if_finite` it never applies a
    bad update, however many come in a row: `skipped_in_a_row` is there for the
    loop to give up with a clear error.

    Args:
      inner: the optimiser.
      initial: first scale.
      growth_factor: factor after `growth_interval` finite steps.
      growth_interval: finite steps between two growths.
      backoff_factor: factor after a step that is not finite.
      floor: smallest scale.
      ceiling: largest scale.

    Returns:
      A transformation whose state is a `LossScaleState`. Gradients must be
      those of the whole mesh, so that all devices decide alike.
    """

    def init(params: Any) -> LossScaleState:
        def zero() -> jax.Array:
            return jnp.zeros((), jnp.int32)

        return LossScaleState(
            jnp.float32(initial), zero(), zero(), zero(), inner.init(params)
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
            grow, jnp.minimum(state.scale * growth_factor, ceiling), state.scale
        )
        shrunk = jnp.maximum(state.scale * backoff_factor, floor)
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
    """bool scalar: no leaf holds an inf or a NaN."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.stack(flags).all() if flags else jnp.bool_(True)


def scale_of(opt_state: Any) -> jax.Array:
    """What to multiply the loss by: the scale, or 1 without the wrapper."""
    if isinstance(opt_state, LossScaleState):
        return opt_state.scale
    return jnp.float32(1.0)


def skips_of(opt_state: Any) -> tuple[jax.Array, jax.Array]:
    """(skipped in all, skipped in a row), zeros without the wrapper."""
    if isinstance(opt_state, LossScaleState):
        return opt_state.skipped, opt_state.skipped_in_a_row
    return jnp.int32(0), jnp.int32(0)
