"""RecVAE blended with closed-form models: the config to start with.

The settings were chosen on the validation users of MovieLens and Yelp2018. They
are the same for all data; the weights of the models in the blend are chosen on
the dataset's own validation users after training.

Test NDCG@100 (baselines on the same split):

    dataset                 test users   blend   EASE    implicit ALS
    MovieLens latest-small  603, folds   .3516   .3383   .3419
    MovieLens-100K          938, folds   .4576   .4473   .4494
    MovieLens-1M            500          .4467   .4231   .4372
    Yelp2018                3,000        .1619   .1407   .1425

Of MovieLens-1M, which uses the paper protocol, the mean of seeds 0, 1 and 2.
With a refit on all users (`--config.train.refit_epochs=4`), .4485 on
MovieLens-1M and .1640 on Yelp2018. docs/results.md has more. Not verified on
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
