"""Searches for hyper-parameters, as `vaecf sweep` does.

    python experiments/sweep.py --config=configs/ml1m.py \\
        --space=configs/sweeps/mult_vae.py --workdir=runs/sweep --trials=40
"""

from vaecf.commands import start

if __name__ == "__main__":
    start("sweep")
