"""Mult-DAE on MovieLens-20M as in Liang et al. 2018: 20,108 - 200 - 20,108.

The authors report NDCG@100 .419, Recall@20 .387, Recall@50 .524 (table 2; their
notebook: .41997, .38768, .52426). With these settings and the data of
configs/netflix.py they report .380, .344, .438, and with those of
configs/msd.py .313, .266, .363 (--config.data.dir=data/netflix or data/msd).
Not verified: the datasets were not available on our machines.

    python experiments/prepare_dataset.py --dataset=ml-20m \\
        --protocol=paper --output=data/ml-20m-paper
    python experiments/main.py --config=configs/ml20m_dae.py \\
        --workdir=runs/ml20m_dae --train --test
"""

from configs import ml20m_paper


def get_config():
    config = ml20m_paper.get_config()
    config.model.name = "mult_dae"
    config.model.hidden = ()
    config.model.latent = 200
    # The notebook's 0.01 / batch_size.
    config.loss.weight_decay = 2e-5
    return config
