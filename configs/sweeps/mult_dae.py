"""Search space for Mult-DAE, which has weight decay instead of a KL term.

For datasets between MovieLens-1M and MovieLens-20M in size. The paper's model
has no hidden layer (20,108 - 200 - 20,108). The base config names the model.

    python experiments/sweep.py --config=configs/ml1m_dae.py \\
        --space=configs/sweeps/mult_dae.py --workdir=runs/sweep-ml1m-dae \\
        --trials=40
"""


def get_space():
    return {
        "optimizer.learning_rate": {"low": 3e-4, "high": 5e-3, "log": True},
        "loss.weight_decay": {"low": 1e-6, "high": 1e-3, "log": True},
        "model.dropout_rate": {"low": 0.2, "high": 0.8},
        "model.latent": {"choices": [50, 100, 200, 400]},
        "model.hidden": {"choices": [(), (600,)]},
    }
