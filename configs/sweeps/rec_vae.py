"""Search space for RecVAE: γ (the weight of the KL term), step size, dropout.

For datasets between MovieLens-1M and MovieLens-20M in size. The authors use γ =
.005 for MovieLens-20M, .0035 for Netflix and .01 for MSD. `model.hidden` is one
size, used by all layers of the encoder. The base config sets
`train.alternating_epochs`.

    python experiments/sweep.py --config=configs/ml1m_recvae.py \\
        --space=configs/sweeps/rec_vae.py --workdir=runs/sweep-ml1m-recvae \\
        --trials=40
"""


def get_space():
    return {
        "optimizer.learning_rate": {"low": 1e-4, "high": 2e-3, "log": True},
        "loss.gamma": {"low": 1e-3, "high": 2e-2, "log": True},
        "model.dropout_rate": {"low": 0.2, "high": 0.8},
        "model.latent": {"choices": [100, 200, 400]},
        "model.hidden": {"choices": [(300,), (600,), (1000,)]},
    }
