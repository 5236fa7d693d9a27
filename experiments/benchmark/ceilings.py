"""What the machine can do at best: matrix products and copies.

A shared machine drifts by a factor of two between hours, so a ceiling means
something only beside what it is compared with: `Product.measure` is meant to
be called in turns with the work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vaecf.parallel import mesh as mesh_lib
from vaecf.training.precision import Policy

# Rows of the product on a CPU, where more of them change nothing but the
# memory; an accelerator gets as many as the batch has.
CPU_ROWS = 4096

_COPY_BYTES = 1 << 28
# Calls between two looks at the clock take about this long, so that neither
# dispatch nor the clock counts.
_CALL_SECONDS = 0.05
_MAX_CALLS = 1000


def flop_floor(hidden: int, n_items: int) -> int:
    """FLOP a user that no implementation of the step can do without.

    Three products at the output layer: logits, gradient of the hidden layer,
    gradient of the weights, 2 FLOP for each of hidden x n_items entries.
    """
    return 3 * 2 * hidden * n_items


class Product(NamedTuple):
    """The decoder's forward product [rows, hidden] x [hidden, items].

    Attributes:
      programs: compiled product by dtype of the result; sums are float32.
      operands: random, in the policy's dtype, sharded over the mesh.
      flop: of one product, the padding items included.
      shape: (rows, hidden, items).
    """

    programs: dict[str, Callable[..., jax.Array]]
    operands: tuple[jax.Array, jax.Array]
    flop: int
    shape: tuple[int, int, int]

    def measure(self, seconds: float) -> list[float]:
        """FLOP/s of each of several timings; at least one, about `seconds`.

        Of the result's dtypes the faster one counts: it is a ceiling.
        """
        share = seconds / len(self.programs)
        rates = [
            [self.flop / t for t in _timings(program, self.operands, share)]
            for program in self.programs.values()
        ]
        return max(rates, key=statistics.median)


def make_product(
    mesh: Mesh, policy: Policy, batch_size: int, hidden: int, n_items: int
) -> Product:
    """The product for a mesh: rows over 'data', items over 'item'.

    Args:
      mesh: ('data', 'item'); the ceiling is that of all its devices.
      policy: dtype of the operands and precision of the product.
      batch_size: rows on an accelerator.
      hidden: width of the last hidden layer.
      n_items: items before padding.
    """
    shards = mesh.shape[mesh_lib.DATA]
    on_cpu = jax.default_backend() == "cpu"
    rows = CPU_ROWS if on_cpu else batch_size
    rows = -(-rows // shards) * shards
    n_padded = mesh_lib.padded_items(n_items)
    specs = (P(mesh_lib.DATA, None), P(None, mesh_lib.ITEM))
    places = tuple(NamedSharding(mesh, spec) for spec in specs)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = jax.random.split(key)
        return (
            jax.random.normal(a, (rows, hidden), policy.dtype),
            jax.random.normal(b, (hidden, n_padded), policy.dtype),
        )

    operands = jax.jit(draw, out_shardings=places)(jax.random.key(0))
    programs = {}
    for dtype in dict.fromkeys((jnp.float32, policy.dtype)):

        def product(a: jax.Array, b: jax.Array, dtype: Any = dtype) -> Any:
            return lax.dot(
                a,
                b,
                precision=policy.precision,
                preferred_element_type=dtype,
            )

        programs[jnp.dtype(dtype).name] = (
            jax.jit(product).lower(*operands).compile()
        )
    return Product(
        programs,
        operands,
        2 * rows * hidden * n_padded,
        (rows, hidden, n_padded),
    )


def copy_bandwidth(seconds: float, n_bytes: int = _COPY_BYTES) -> float:
    """Bytes/s read and written by an elementwise pass over a large array.

    One device; the median of several timings.
    """
    x = jax.jit(lambda: jnp.ones(n_bytes // 4, jnp.float32))()
    program = jax.jit(jnp.negative).lower(x).compile()
    return 2 * n_bytes / statistics.median(_timings(program, (x,), seconds))


def _timings(
    program: Callable[..., Any], operands: tuple[Any, ...], seconds: float
) -> list[float]:
    """Seconds of one call, several times, for about `seconds` in all."""

    def run(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            result = program(*operands)
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / calls

    # The first call touches its result's memory for the first time.
    run(1)
    deadline = time.perf_counter() + seconds
    calls = min(_MAX_CALLS, max(1, round(_CALL_SECONDS / run(1))))
    timings = [run(calls)]
    while time.perf_counter() < deadline:
        timings.append(run(calls))
    return timings
