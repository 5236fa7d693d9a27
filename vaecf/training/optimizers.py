"""The optimiser: Adam, wrapped in the loss scale where the policy needs it."""

from __future__ import annotations

import optax

from vaecf.options import OptimizerOptions, PrecisionOptions
from vaecf.training import loss_scale
from vaecf.training.precision import Policy


def make_optimizer(
    options: OptimizerOptions, precision: PrecisionOptions, policy: Policy
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) with float32 moments.

    Args:
      options: learning rate, betas, epsilon.
      precision: settings of the loss scale.
      policy: decides whether the loss is scaled.
    """
    adam = optax.adam(
        options.learning_rate,
        b1=options.beta1,
        b2=options.beta2,
        eps=options.epsilon,
    )
    if not policy.loss_scaled:
        return adam
    return loss_scale.dynamic_loss_scale(
        adam,
        initial=precision.initial_loss_scale,
        growth_interval=precision.loss_scale_growth_interval,
    )
