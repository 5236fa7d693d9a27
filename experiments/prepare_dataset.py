"""Turns ratings into a dataset, as `vaecf prepare` does.

    python experiments/prepare_dataset.py --dataset=ml-1m \\
        --ratings=ml-1m/ratings.dat --protocol=paper --held_out_users=500
"""

from vaecf.commands import start

if __name__ == "__main__":
    start("prepare_dataset")
