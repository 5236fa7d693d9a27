"""The fastest matrix products of a machine, which bound every implementation.

The speed of a shared machine drifts by a factor of two within hours. A ceiling
is therefore measured in turns with the work that it is compared with.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmark import common
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import precision

# Rows of the product on a CPU, where more rows change only the memory. An
# accelerator gets the rows of the batch.
CPU_ROWS = 4096


def training_flop(hidden: int, n_items: int) -> int:
    """Returns the FLOP per user that every implementation of a step needs.

    Three products of the output layer (logits, gradient of the hidden layer,
    gradient of the weights), with 2 FLOP for each of hidden x n_items entries.
    """
    return 3 * 2 * hidden * n_items


class DecoderProduct:
    """The product [rows, hidden] x [hidden, items] of the output layer.

    Attributes:
      shape: (rows, hidden, items), padding items included.
    """

    def __init__(
        self,
        mesh: Mesh,
        policy: precision.Policy,
        batch_size: int,
        hidden: int,
        n_items: int,
    ) -> None:
        """Compiles the product, sharded over the mesh.

        Args:
          mesh: ('data', 'item'); the ceiling is that of all its devices.
          policy: dtype of the operands, and precision of the product.
          batch_size: rows on an accelerator.
          hidden: width of the last hidden layer.
          n_items: items before padding.
        """
        shards = mesh.shape[mesh_lib.DATA]
        rows = CPU_ROWS if jax.default_backend() == "cpu" else batch_size
        rows = -(-rows // shards) * shards
        n_padded = mesh_lib.padded_items(n_items)
        self.shape = (rows, hidden, n_padded)
        specs = (P(mesh_lib.DATA, None), P(None, mesh_lib.ITEM))
        places = tuple(NamedSharding(mesh, spec) for spec in specs)

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            a, b = jax.random.split(key)
            return (
                jax.random.normal(a, (rows, hidden), policy.dtype),
                jax.random.normal(b, (hidden, n_padded), policy.dtype),
            )

        operands = jax.jit(draw, out_shardings=places)(jax.random.key(0))
        # Sums are float32; a narrower result may be faster to write.
        self._calls = [
            functools.partial(self._compile(operands, policy, dtype), *operands)
            for dtype in dict.fromkeys((jnp.float32, policy.dtype))
        ]

    @staticmethod
    def _compile(operands: Any, policy: precision.Policy, dtype: Any) -> Any:
        def product(a: jax.Array, b: jax.Array) -> jax.Array:
            return lax.dot(
                a, b, precision=policy.precision, preferred_element_type=dtype
            )

        return jax.jit(product).lower(*operands).compile()

    def gflops(self, seconds: float) -> list[float]:
        """Returns the GFLOP/s of several timings, about `seconds` in all.

        Takes the fastest dtype of the result, since this is a ceiling.
        """
        rows, hidden, items = self.shape
        rates = []
        for call in self._calls:
            # The first call touches the memory of its result.
            jax.block_until_ready(call())
            times = common.timings(call, seconds / len(self._calls))
            rates.append([2e-9 * rows * hidden * items / t for t in times])
        return max(rates, key=statistics.median)
