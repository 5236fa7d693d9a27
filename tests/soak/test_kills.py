"""A short part of the campaign of kills; `make soak` is the long one."""

import random

import kills
import numpy as np


def test_nothing_is_lost(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        f"{user},{item}"
        for user in range(300)
        for item in rng.choice(60, 12, replace=False)
    ]
    (tmp_path / "h.csv").write_text("\n".join(["user,item", *rows]))
    scenario = kills.scenarios(tmp_path)["replace"]
    kills.soak("replace", scenario, 3, random.Random(5), tmp_path / "work")
