"""The examples in the docstrings of the public names run."""

import doctest
import inspect

import matplotlib
import numpy as np
import pandas as pd
import pytest
from oracles import one_device

import vaecf

matplotlib.use("agg")

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
SMALL = dict(model="mult_vae", hidden=8, latent=4, epochs=3, refit_epochs=0)
# Have no behaviour of their own.
WITHOUT = {"VaecfError", "Interactions", "Dataset", "Run"}


def names():
    """Public names, and public methods of `Recommender`."""
    for name in vaecf.__all__:
        yield name
    for name in dir(vaecf.Recommender):
        if not name.startswith("_"):
            yield f"Recommender.{name}"


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """What the examples take for granted, on one device."""
    rng = np.random.default_rng(0)
    users = ["ann", *(f"user-{u:02d}" for u in range(1, 60))]
    rows = [
        (user, f"sku-{i:02d}")
        for user in users
        for i in rng.choice(30, rng.integers(5, 10), replace=False)
    ]
    frame = pd.DataFrame(rows, columns=["user", "item"])
    split = vaecf.split(frame)
    with one_device():
        yield {
            "vaecf": vaecf,
            "np": np,
            "pd": pd,
            "frame": frame,
            "split": split,
            "recommender": vaecf.Recommender(**SMALL).fit(split),
            "folder": tmp_path_factory.mktemp("examples"),
        }


@pytest.mark.parametrize("name", [*names()])
def test_example(name, examples, capsys):
    found = vaecf
    for part in name.split("."):
        found = inspect.getattr_static(found, part, None) or getattr(
            found, part
        )
    if isinstance(found, (property, classmethod)):
        found = getattr(found, "fget", None) or found.__func__
    found = inspect.unwrap(found)
    text = inspect.getdoc(found) or ""
    test = doctest.DocTestParser().get_doctest(
        text, dict(examples), name, None, 0
    )
    assert test.examples or name in WITHOUT, f"{name} has no example"
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test)
    assert result.failed == 0, capsys.readouterr().out
