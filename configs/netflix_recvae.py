"""RecVAE on the Netflix Prize data, paper protocol, 40,000 + 40,000 users.

Shenbin et al. 2020 report NDCG@100 .394, Recall@20 .361, Recall@50 .452 (table
1), with γ .0035. Not verified: the dataset was not available on our machines.

    python experiments/prepare_dataset.py --dataset=netflix \\
        --ratings=DIRECTORY_OF_combined_data --output=data/netflix
    python experiments/main.py --config=configs/netflix_recvae.py \\
        --workdir=runs/netflix_recvae --train --test
"""

import ml_collections

from configs import ml20m_recvae


def get_config() -> ml_collections.ConfigDict:
    """Returns the config that the module's docstring describes."""
    config = ml20m_recvae.get_config()
    config.data.dir = "data/netflix"
    config.loss.gamma = 0.0035
    return config
