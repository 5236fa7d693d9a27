"""What matters for Mult-DAE: weight decay in place of a KL term.

For datasets of the size of MovieLens-1M to 20M; the paper's model has no hidden
layer (20,108 - 200 - 20,108). The model's name belongs to the base config.

    python experiments/sweep.py --config=configs/ml1m_dae.py \\
        --space=configs/sweeps/mult_dae.py --workdir=runs/sweep-ml1m-dae \\
        --trials=40
"""


def get_space() -> dict:
    """Returns the space that the module's docstring describes."""
    return {
        "optimizer.learning_rate": {"low": 3e-4, "high": 5e-3, "log": True},
        "loss.weight_decay": {"low": 1e-6, "high": 1e-3, "log": True},
        "model.dropout_rate": {"low": 0.2, "high": 0.8},
        "model.latent": {"choices": [50, 100, 200, 400]},
        "model.hidden": {"choices": [(), (600,)]},
    }
