"""Mult-DAE on the Million Song Dataset, paper protocol, 50,000 + 50,000 users.

Liang et al. 2018 report NDCG@100 .313, Recall@20 .266, Recall@50 .363 (table
2). Settings as theirs for MovieLens-20M; which they used here is not published
in code. Not verified here: the dataset could not be had where this was written.

    python experiments/prepare_dataset.py --dataset=msd --output=data/msd
    python experiments/main.py --config=configs/msd_dae.py \
        --workdir=runs/msd_dae --train --test
"""

import ml_collections

from configs import ml20m_dae


def get_config() -> ml_collections.ConfigDict:
    """Returns the config that the module's docstring describes."""
    config = ml20m_dae.get_config()
    config.data.dir = "data/msd"
    return config
