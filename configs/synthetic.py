"""Mult-VAE on the generated dataset: what `make demo` runs.

@synthetic@

    python experiments/prepare_dataset.py --dataset=synthetic \\
        --output=data/synthetic
    python experiments/main.py --config=configs/synthetic.py \\
        --workdir=runs/synthetic --train --test --baselines
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config that the module's docstring describes."""
    config = default.get_config()
    config.data.dir = "data/synthetic"
    config.model.hidden = (200,)
    config.model.latent = 64
    config.train.batch_size = 200
    config.train.epochs = 40
    config.eval.every_epochs = 2
    config.loss.anneal_cap = 0.3
    config.loss.total_anneal_steps = 2_000
    return config
