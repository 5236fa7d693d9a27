"""Mult-VAE on the Million Song Dataset, paper protocol, 50,000 + 50,000 users.

Liang et al. 2018 report NDCG@100 .316, Recall@20 .266, Recall@50 .364 (table
2); linear models do better here (EASE .389, Steck 2019). The settings are those
of MovieLens-20M: the authors' code has none for this dataset. Not verified: the
dataset was not available on our machines.

    python experiments/prepare_dataset.py --dataset=msd --output=data/msd
    python experiments/main.py --config=configs/msd.py \\
        --workdir=runs/msd --train --test
"""

from configs import ml20m_paper


def get_config():
    config = ml20m_paper.get_config()
    config.data.dir = "data/msd"
    return config
