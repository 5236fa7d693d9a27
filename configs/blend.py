"""RecVAE blended with a linear item-item model: the config to start with.

The settings were chosen on the validation users of MovieLens-1M and used
unchanged on the other datasets. The weights of the two models in the blend are
chosen on the dataset's own validation users after training.

Test NDCG@100, mean of seeds 0, 1 and 2 (baselines on the same split):

    dataset                 test users   blend   EASE    implicit ALS
    MovieLens-100K          100          .4926   .4782   .4800
    MovieLens latest-small  59           .3154   .3107   .3250
    MovieLens-1M            500          .4454   .4231   .4349
    Yelp2018                3,000        .1584   .1407   .1425

The MovieLens datasets use the paper protocol. On MovieLens-1M random instead of
spectral initial weights reach .4466 in 160 epochs. Not verified on
MovieLens-20M, Netflix and the Million Song Dataset.

    python experiments/prepare_dataset.py --dataset=ml-1m \\
        --protocol=paper --held_out_users=500 --output=data/ml-1m
    python experiments/main.py --config=configs/blend.py \\
        --config.data.dir=data/ml-1m --workdir=runs/blend \\
        --train --test --baselines
"""

from configs import default
from vaecf import config as config_lib


def get_config():
    config = default.get_config()
    config.update_from_flattened_dict(config_lib.BLEND)
    return config
