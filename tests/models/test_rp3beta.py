"""RP3beta against dense powers of the transition matrices."""

import numpy as np
import oracles
import pytest

from vaecf.models import rp3beta, sparse_item_item


@pytest.mark.parametrize(
    ("neighbours", "alpha", "beta"), [(4, 1.3, 0.5), (30, 0.6, 0.0), (1, 0, 2)]
)
def test_rp3beta(neighbours, alpha, beta):
    x = oracles.random_dense(30, 20)
    x[:, 19] = 0
    x[3] = 0
    params = rp3beta.fit(oracles.interactions(x), neighbours, alpha, beta)
    got = sparse_item_item.unpack(params).toarray()
    assert got.dtype == np.float32
    expected = oracles.rp3beta(x, neighbours, alpha, beta)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
