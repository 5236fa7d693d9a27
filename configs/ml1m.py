"""Mult-VAE on MovieLens-1M, paper protocol, 500 + 500 held-out users.

@ml1m@

    python experiments/prepare_dataset.py --dataset=ml-1m \\
        --protocol=paper --held_out_users=500 --output=data/ml-1m
    python experiments/main.py --config=configs/ml1m.py \\
        --workdir=runs/ml1m --train --test --baselines

`--ratings=FILE` prepares from a file that is there already.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config that the module's docstring describes."""
    config = default.get_config()
    config.data.dir = "data/ml-1m"
    config.train.batch_size = 250
    config.train.epochs = 100
    config.eval.every_epochs = 2
    config.eval.batch_size = 500
    config.loss.anneal_cap = 0.2
    config.loss.total_anneal_steps = 10_000
    return config
