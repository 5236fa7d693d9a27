"""Every setting at its default: Mult-VAE of Liang et al. 2018.

`vaecf/config.py` declares the settings, with their meaning and units. The
other config files start from this one and change a few keys, and so does the
command line:

    python experiments/main.py --config=configs/ml1m.py \\
        --config.optimizer.learning_rate=1e-3 --workdir=runs/a --train --test
"""

import dataclasses

import ml_collections
from ml_collections import config_dict

from vaecf import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults that `vaecf/config.py` declares."""
    values = dataclasses.asdict(config_lib.Config())
    for section in values.values():
        if isinstance(section, dict):
            for key, value in section.items():
                if value is None:
                    # A placeholder has the type that None lacks.
                    section[key] = config_dict.placeholder(int)
    # A misspelt key of a config file is an error in its line.
    return ml_collections.ConfigDict(values).lock()
