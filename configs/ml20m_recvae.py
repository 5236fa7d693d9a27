"""RecVAE on MovieLens-20M as in Shenbin et al. 2020.

The authors report NDCG@100 .442, Recall@20 .414, Recall@50 .553 (table 1). 200
epochs are 50 rounds: three epochs train the encoder, then one trains the
decoder. For the data of configs/netflix.py they report .394, .361, .452 with
γ .0035 (--config.data.dir=data/netflix --config.loss.gamma=0.0035), and for
those of configs/msd.py .326, .276, .374 with γ .01. Not verified: the datasets
were not available on our machines.

    python experiments/prepare_dataset.py --dataset=ml-20m \\
        --protocol=paper --output=data/ml-20m-paper
    python experiments/main.py --config=configs/ml20m_recvae.py \\
        --workdir=runs/ml20m_recvae --train --test
"""

from configs import ml20m_paper


def get_config():
    config = ml20m_paper.get_config()
    config.model.name = "rec_vae"
    config.loss.gamma = 0.005
    config.optimizer.learning_rate = 5e-4
    config.train.alternating_epochs = (3, 1)
    config.train.epochs = 200
    config.train.batch_size = 500
    config.eval.every_epochs = 4
    return config
