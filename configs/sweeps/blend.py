"""Search space for the RecVAE of a blend.

All keys can differ between the members of a population, so trials can train
together:

    python experiments/sweep.py --config=configs/blend.py \\
        --config.data.dir=data/ml-1m --space=configs/sweeps/blend.py \\
        --workdir=runs/sweep-blend --trials=16 --population=4
"""


def get_space():
    return {
        "optimizer.learning_rate": {"low": 1e-4, "high": 2e-3, "log": True},
        "loss.gamma": {"low": 1e-3, "high": 2e-2, "log": True},
        "model.dropout_rate": {"low": 0.3, "high": 0.8},
    }
