"""Mult-DAE on the Netflix Prize data, paper protocol, 40,000 + 40,000 users.

Liang et al. 2018 report NDCG@100 .380, Recall@20 .344, Recall@50 .438 (table
2). The settings are those of MovieLens-20M, as the authors' code has none for
this dataset. Not verified: the dataset was not available on our machines.

    python experiments/prepare_dataset.py --dataset=netflix \\
        --ratings=DIRECTORY_OF_combined_data --output=data/netflix
    python experiments/main.py --config=configs/netflix_dae.py \\
        --workdir=runs/netflix_dae --train --test
"""

import ml_collections

from configs import ml20m_dae


def get_config() -> ml_collections.ConfigDict:
    """Returns the config that the module's docstring describes."""
    config = ml20m_dae.get_config()
    config.data.dir = "data/netflix"
    return config
