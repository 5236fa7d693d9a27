"""RecVAE on MovieLens-1M, paper protocol, 500 + 500 held-out users.

    python experiments/main.py --config=configs/ml1m_recvae.py \\
        --workdir=runs/ml1m-recvae --train --test --baselines
"""

import ml_collections

from configs import ml1m


def get_config() -> ml_collections.ConfigDict:
    """Shenbin et al. 2020 with the settings of the authors' code."""
    config = ml1m.get_config()
    config.model.name = "rec_vae"
    config.loss.gamma = 0.005
    config.optimizer.learning_rate = 5e-4
    config.train.alternate = (3, 1)
    config.train.epochs = 200
    config.train.batch_size = 500
    config.eval.every_epochs = 4
    return config
