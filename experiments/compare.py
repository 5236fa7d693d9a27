"""Compares finished runs user by user, as `vaecf compare` does.

python experiments/compare.py runs/a runs/b --metric=ndcg@100
"""

from vaecf.commands import start

if __name__ == "__main__":
    start("compare")
