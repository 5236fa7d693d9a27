"""The models that are fitted in one go, and their settings."""

import dataclasses

from vaecf.setting import COUNT, NOT_NEGATIVE, POSITIVE, setting

# Models that are fitted in one go, without epochs: the baselines.
FITTED = ("popularity", "itemknn", "rp3beta", "slim", "ials", "ease")


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """Settings of the models that are fitted in one go: <model>_<setting>."""

    itemknn_neighbours: int = setting(
        100,
        "Neighbours that ItemKNN keeps per item.",
        COUNT,
        grid=(5, 10, 20, 50, 100, 200, 500, 1000),
    )
    itemknn_shrinkage: float = setting(
        0.0,
        "Shrinkage of ItemKNN's similarities, in users.",
        NOT_NEGATIVE,
        grid=(0.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    )
    rp3beta_neighbours: int = setting(
        100,
        "Neighbours that RP3beta keeps per item.",
        COUNT,
        grid=(10, 20, 50, 100, 200, 500, 1000),
    )
    rp3beta_alpha: float = setting(
        0.6,
        "Exponent of RP3beta's transition probabilities.",
        NOT_NEGATIVE,
        grid=(0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5),
    )
    rp3beta_beta: float = setting(
        0.6,
        "Exponent of the popularity that RP3beta divides by.",
        NOT_NEGATIVE,
        grid=(0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0),
    )
    slim_neighbours: int = setting(
        200,
        "Nearest items that SLIM's regression of an item may use.",
        COUNT,
        grid=(50, 100, 200, 400),
    )
    slim_l2: float = setting(
        300.0,
        "L2 regularisation λ of SLIM, in squared interactions.",
        POSITIVE,
        grid=(10.0, 20.0, 50.0, 100.0, 200.0, 300.0, 500.0, 1000.0),
    )
    ials_factors: int = setting(
        64,
        "Factors of implicit ALS.",
        COUNT,
        grid=(16, 32, 64, 128, 256, 512),
    )
    ials_l2: float = setting(
        0.003,
        "L2 regularisation λ of implicit ALS; grows with a user's or item's "
        "interactions.",
        POSITIVE,
        grid=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    )
    ials_alpha: float = setting(
        0.3,
        "Weight of unobserved items in implicit ALS; observed items add 1.",
        POSITIVE,
        grid=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    )
    ials_iterations: int = setting(
        16, "Sweeps of implicit ALS over users and items.", COUNT
    )
    ease_l2: float = setting(
        500.0,
        "L2 regularisation λ of EASE, in squared interactions.",
        POSITIVE,
        grid=(
            *(10.0, 20.0, 50.0, 100.0, 200.0, 300.0, 500.0),
            *(700.0, 1000.0, 2000.0, 5000.0, 10000.0),
        ),
    )
