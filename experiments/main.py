"""Trains, tests and times a model: `vaecf train` and `vaecf test` in one.

    python experiments/main.py --config=configs/ml1m.py \\
        --config.data.dir=data/ml-1m --workdir=runs/ml1m --train --test
"""

from vaecf.commands import start

if __name__ == "__main__":
    start("main")
