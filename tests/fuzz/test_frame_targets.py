"""A short part of the fuzzing of frames, matrices and settings."""

import collections
import random

import pytest

from tests.fuzz import frame_targets


@pytest.mark.parametrize("name", ["table", "matrix", "junk"])
def test_target(name):
    target = getattr(frame_targets, name)
    seeds = [f"{name}:{number}" for number in range(40)]
    outcomes = collections.Counter(target(random.Random(s)) for s in seeds)
    # An input that is always refused would prove nothing.
    assert outcomes["read"] > 5
