"""RecVAE on MovieLens-1M, paper protocol, 500 + 500 held-out users.

Test NDCG@100 .4266, .4290, .4284 with the seeds 0, 1, 2, mean .4280; Recall@20
.3585, Recall@50 .4920; standard error over the 500 test users .008, .009, .010.
The authors' PyTorch code has .4263, .3563, .4936 on the same split, with the
same settings. 138 s of training on 2 cores of an AMD EPYC.
200 epochs are the authors' 50 rounds, of three of the encoder and one of the
decoder.

    python experiments/prepare_dataset.py --dataset=ml-1m \\
        --protocol=paper --held_out_users=500 --output=data/ml-1m
    python experiments/main.py --config=configs/ml1m_recvae.py \\
        --workdir=runs/ml1m-recvae --train --test --baselines
"""

import ml_collections

from configs import ml20m_recvae


def get_config() -> ml_collections.ConfigDict:
    """Shenbin et al. 2020 with the settings of the authors' code."""
    config = ml20m_recvae.get_config()
    config.data.dir = "data/ml-1m"
    config.eval.batch_size = 500
    return config
