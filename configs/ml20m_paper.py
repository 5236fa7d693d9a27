"""Mult-VAE on MovieLens-20M as in Liang et al. 2018.

The authors report NDCG@100 .426, Recall@20 .395, Recall@50 .537 (table 2; their
notebook: .42592, .39535, .53540). Not verified: the dataset was not available
on our machines.

    python experiments/prepare_dataset.py --dataset=ml-20m \\
        --protocol=paper --output=data/ml-20m-paper
    python experiments/main.py --config=configs/ml20m_paper.py \\
        --workdir=runs/ml20m_paper --train --test
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.dir = "data/ml-20m-paper"
    config.train.batch_size = 500
    config.train.epochs = 200
    config.loss.anneal_cap = 0.2
    config.loss.total_anneal_steps = 200_000
    return config
