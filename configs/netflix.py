"""Mult-VAE on the Netflix Prize data, paper protocol, 40,000 + 40,000 users.

Liang et al. 2018 report NDCG@100 .386, Recall@20 .351, Recall@50 .444 (table
2). The settings are those of MovieLens-20M: the authors' code has none for this
dataset. Not verified: the dataset was not available on our machines.

    python experiments/prepare_dataset.py --dataset=netflix \\
        --ratings=DIRECTORY_OF_combined_data --output=data/netflix
    python experiments/main.py --config=configs/netflix.py \\
        --workdir=runs/netflix --train --test
"""

from configs import ml20m_paper


def get_config():
    config = ml20m_paper.get_config()
    config.data.dir = "data/netflix"
    return config
