"""The order of training: a pure function of (seed, epoch).

A run can be taken up at any step without having stored an iterator.
"""

from __future__ import annotations

import numpy as np

from vaecf.errors import VaecfError


def epoch_order(
    seed: int,
    epoch: int,
    n_users: int,
    batch_size: int,
    *,
    drop_remainder: bool = False,
    parts: int = 1,
) -> np.ndarray:
    """Users of every batch of an epoch, a function of (seed, epoch) alone.

    Args:
      seed: seed of the run.
      epoch: counted from 0.
      n_users: training users.
      batch_size: users a batch, over all devices.
      drop_remainder: leave out the users that do not fill the last batch (a
        different set each epoch), instead of padding it.
      parts: microbatches that a batch is split into, over all devices.
        Padding users behind every batch bring it to a multiple of them, so
        that the batches are the same however they are split.

    Returns:
      int32 [steps, batch_size, rounded up]; n_users marks a padding user.
    """
    order = (
        np.random.Generator(np.random.PCG64([seed, epoch]))
        .permutation(n_users)
        .astype(np.int32)
    )
    steps = steps_per_epoch(n_users, batch_size, drop_remainder)
    padded = np.full(steps * batch_size, n_users, np.int32)
    used = min(n_users, len(padded))
    padded[:used] = order[:used]
    return np.pad(
        padded.reshape(steps, batch_size),
        ((0, 0), (0, -batch_size % parts)),
        constant_values=n_users,
    )


def steps_per_epoch(n_users: int, batch_size: int, drop_remainder: bool) -> int:
    """Batches of an epoch.

    Raises:
      VaecfError: there is none.
    """
    whole, rest = divmod(n_users, batch_size)
    steps = whole if drop_remainder else whole + bool(rest)
    if steps == 0:
        raise VaecfError(
            f"config.train.batch_size={batch_size} is larger than the "
            f"{n_users} training users and config.train.drop_remainder is "
            "set: no batch is left; lower the batch size"
        )
    return steps
