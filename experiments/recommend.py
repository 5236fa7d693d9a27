"""Recommends items to every user of a file, as `vaecf recommend` does.

    python experiments/recommend.py --workdir=runs/ml1m \\
        --histories=histories.csv --k=10 --output=recommendations.parquet
"""

from vaecf.commands import start

if __name__ == "__main__":
    start("recommend")
