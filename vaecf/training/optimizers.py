"""The optimiser: Adam, wrapped in the loss scale where the policy needs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from vaecf.config import OptimizerConfig, PrecisionConfig
from vaecf.training import loss_scale
from vaecf.training.precision import Policy


def make_optimizer(
    config: OptimizerConfig,
    precision: PrecisionConfig,
    policy: Policy,
    groups: Mapping[str, tuple[str, ...]] | None = None,
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) with float32 moments.

    Args:
      config: learning rate, betas, epsilon.
      precision: settings of the loss scale.
      policy: decides whether the loss is scaled.
      groups: top-level parameters that are trained in turns; None or empty
        trains all of them together.
    """
    adam = optax.adam(
        config.learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
    )
    if groups:
        adam = alternating(adam, groups)
    if not policy.loss_scaled:
        return adam
    return loss_scale.dynamic_loss_scale(
        adam,
        initial=precision.initial_loss_scale,
        growth_interval=precision.loss_scale_growth_interval,
    )


def alternating(
    inner: optax.GradientTransformation, groups: Mapping[str, tuple[str, ...]]
) -> optax.GradientTransformation:
    """An optimiser of its own for each group of top-level parameters.

    Its update takes the gradients of some groups, whole, and leaves the others'
    states (moments and step counts) as they are.
    """

    def part(tree: Any, names: tuple[str, ...]) -> Any:
        return {name: tree[name] for name in names}

    def init(params: Any) -> dict[str, Any]:
        return {
            g: inner.init(part(params, names)) for g, names in groups.items()
        }

    def update(
        grads: Any, state: dict[str, Any], params: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        del params  # Adam does not look at them
        updates: dict[str, Any] = {}
        states = dict(state)
        for group, names in groups.items():
            if names[0] in grads:
                more, states[group] = inner.update(
                    part(grads, names), state[group]
                )
                updates |= more
        return updates, states

    return optax.GradientTransformation(init, update)
