"""Trains runs that differ in numbers together, as `vaecf population` does.

    python experiments/population.py --config=configs/ml1m.py \\
        --workdir=runs/pop --members=seed=0,1 --members=loss.gamma=0.01,0.02
"""

from vaecf.commands import start

if __name__ == "__main__":
    start("population")
