"""Search space for Mult-VAE: the KL term first, then step size and dropout.

For datasets between MovieLens-1M and MovieLens-20M in size. On small datasets
the annealing cap matters most. The length of the annealing is in steps: a base
config with another batch size or number of epochs needs other bounds.

    python experiments/sweep.py --config=configs/ml1m.py \\
        --space=configs/sweeps/mult_vae.py --workdir=runs/sweep-ml1m \\
        --trials=40
"""


def get_space():
    return {
        "optimizer.learning_rate": {"low": 3e-4, "high": 5e-3, "log": True},
        "loss.anneal_cap": {"low": 0.0, "high": 1.0},
        "loss.total_anneal_steps": {"low": 1_000, "high": 50_000, "log": True},
        "model.dropout_rate": {"low": 0.2, "high": 0.8},
        "model.latent": {"choices": [50, 100, 200, 400]},
        "model.hidden": {"choices": [(300,), (600,), (1000,)]},
    }
