"""Mult-VAE on the Million Song Dataset, paper protocol, 50,000 + 50,000 users.

Liang et al. 2018 report NDCG@100 .316, Recall@20 .266, Recall@50 .364
(table 2); linear models do better here (EASE .389, Steck 2019). Settings as
theirs for MovieLens-20M; which they used here is not published in code. Not
verified here: the dataset could not be had where this was written.

    python experiments/prepare_dataset.py --dataset=msd --output=data/msd
    python experiments/main.py --config=configs/msd.py \\
        --workdir=runs/msd --train --test
"""

import ml_collections

from configs import ml20m_paper


def get_config() -> ml_collections.ConfigDict:
    """Returns the config that the module's docstring describes."""
    config = ml20m_paper.get_config()
    config.data.dir = "data/msd"
    return config
