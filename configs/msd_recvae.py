"""RecVAE on the Million Song Dataset, paper protocol, 50,000 + 50,000 users.

Shenbin et al. 2020 report NDCG@100 .326, Recall@20 .276, Recall@50 .374 (table
1), with γ .01; linear models do better here (EASE .389, Steck 2019). Not
verified: the dataset was not available on our machines.

    python experiments/prepare_dataset.py --dataset=msd --output=data/msd
    python experiments/main.py --config=configs/msd_recvae.py \\
        --workdir=runs/msd_recvae --train --test
"""

import ml_collections

from configs import ml20m_recvae


def get_config() -> ml_collections.ConfigDict:
    """Returns the config that the module's docstring describes."""
    config = ml20m_recvae.get_config()
    config.data.dir = "data/msd"
    config.loss.gamma = 0.01
    return config
