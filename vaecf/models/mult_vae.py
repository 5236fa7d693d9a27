"""Mult-VAE and Mult-DAE (Liang, Krishnan, Hoffman, Jebara, WWW 2018).

Both are autoencoders I - hidden - latent - hidden - I over a user's bag of
items with a multinomial likelihood. The bottleneck is a Gaussian in the VAE
and a plain layer in the DAE.

Shapes in names: B users, I items (the local shard of them), H units of a
hidden layer, Z dimensions of the code.

Every model keeps this contract:
  `init(key, batch)` returns {'params': ...};
  `keys(key)` returns the keys of the random numbers of a step, from its key;
  `loss_terms(batch, keys, first_row)` returns the per-user (nll_B, kl_B);
  `scores(batch)` returns the ranking scores, float32 [B, I];
  `encode(batch)` returns the users' representations, float32 [B, Z];
  `phase(epoch, config)` returns what an epoch trains;
  `GROUPS` names the top-level parameters of each group that a phase can train
  alone ({} for a model that is always trained as a whole);
  `TRAINING_ONLY` names the top-level parameters that scoring does not need.
`PARTITION` gives, for every parameter, the mesh axis of each dimension.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vaecf.config import TrainConfig
from vaecf.models import bag_of_items, layers, likelihood, losses, noise
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

# Mesh axes by parameter name; all other parameters are replicated.
PARTITION: dict[str, tuple[str | None, ...]] = {
    "input_kernel": ("item", None),
    "output_kernel": (None, "item"),
    "output_bias": ("item",),
}


class Phase(NamedTuple):
    """Describes what the steps of an epoch train."""

    # Key of the model's `GROUPS`, or 'all' for every parameter.
    group: str = "all"
    dropout: bool = True  # whether the input is dropped out
    # (source, target) names of top-level parameters to copy before the first
    # step of the epoch.
    copies: tuple[tuple[str, str], ...] = ()


ALL = Phase()


def uniform_items(
    n_items: int, item_dimension: int, limit: float
) -> Callable[..., jax.Array]:
    """Returns an initialiser, uniform in ±limit and 0 for padding items.

    Random numbers depend on the shape of the array. Every mesh therefore draws
    the array of one device, so that padding does not change the model.
    """

    def init(
        key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        drawn, rows = list(shape), shape[item_dimension]
        drawn[item_dimension] = min(rows, mesh_lib.padded_items(n_items))
        value = jax.random.uniform(key, drawn, dtype, -limit, limit)
        missing = [(0, n - m) for n, m in zip(shape, drawn, strict=True)]
        value = jnp.pad(value, missing)
        index = lax.broadcasted_iota(jnp.int32, shape, item_dimension)
        return jnp.where(index < n_items, value, 0.0)

    return init


_bias_init = nn.initializers.truncated_normal(stddev=0.001)


class MultDAE(nn.Module):
    """Denoising autoencoder with a multinomial likelihood."""

    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {}
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ()
    CODES: ClassVar[int] = 1  # arrays [B, latent] that the encoder returns

    n_items: int  # items of the catalogue
    # Items of this shard, padding included: the rows of the input kernel and
    # the columns of the output kernel.
    item_rows: int
    # Sizes of the encoder's hidden layers, e.g. (600,); the decoder has the
    # same in reverse.
    hidden: tuple[int, ...] = (600,)
    latent: int = 200  # size of the bottleneck
    activation: str = "tanh"  # 'tanh' or 'relu'
    dropout_rate: float = 0.5  # probability of dropping an item from the input
    # 'gather' or 'dense', see `bag_of_items.bag_of_items`.
    input_lowering: str = "gather"
    # Items per block of the likelihood, 0 for a single block.
    item_block: int = 0
    dtype: Any = jnp.float32  # dtype of the matrix products' operands
    precision: Any = None  # precision of the matrix products
    # Mesh axis of the items inside `jax.shard_map`, else None.
    item_axis: str | None = None
    # Platform to write the program for (`mesh.platform_of`); None for JAX's
    # default.
    platform: str | None = None

    @classmethod
    def phase(cls, epoch: int, config: TrainConfig) -> Phase:
        """Returns what an epoch (counted from 0) trains: all parameters."""
        return ALL

    def _layers(self, *sizes: int) -> list[layers.Layer]:
        init = nn.initializers.glorot_uniform()
        return [
            layers.Layer(shape, init, _bias_init)
            for shape in itertools.pairwise(sizes)
        ]

    def _biases(self, n_users: int | None) -> list[jax.Array]:
        """Returns the biases of all hidden layers, see `layers.rows`."""
        rest = [layer()[1] for layer in (*self.encoder, *self.decoder)]
        return layers.rows(
            [self.input_bias, *rest],
            # XLA copies float32 gradients first, see `layers.rows`.
            n_users if layers.rounds(self.dtype, self.platform) else None,
            dtype=self.dtype,
            platform=self.platform,
        )

    def _dense(
        self, x_BH: jax.Array, layer: layers.Layer, bias: jax.Array
    ) -> jax.Array:
        return layers.dense(
            x_BH,
            layer()[0],
            bias,
            dtype=self.dtype,
            precision=self.precision,
            platform=self.platform,
        )

    def _activate(self, x_BH: jax.Array) -> jax.Array:
        return layers.activate(
            self.activation, x_BH, dtype=self.dtype, platform=self.platform
        )

    def _glorot(self, units: int) -> float:
        # Padding items do not count in the fan.
        return (6.0 / (self.n_items + units)) ** 0.5

    def setup(self) -> None:
        """Creates parameters and layers; called by Flax."""
        first, *rest = (*self.hidden, self.CODES * self.latent)
        self.input_kernel = self.param(
            "input_kernel",
            uniform_items(self.n_items, 0, self._glorot(first)),
            (self.item_rows, first),
        )
        self.input_bias = self.param("input_bias", _bias_init, (first,))
        self.encoder = self._layers(first, *rest)
        self.decoder = self._layers(self.latent, *reversed(self.hidden))
        last = self.hidden[0] if self.hidden else self.latent
        self.output_kernel = self.param(
            "output_kernel",
            uniform_items(self.n_items, 1, self._glorot(last)),
            (last, self.item_rows),
        )
        self.output_bias = self.param(
            "output_bias", _bias_init, (self.item_rows,)
        )

    def input_layer(self) -> Callable[..., jax.Array]:
        """Returns `bag_of_items.normalised_bag` with the model's settings."""
        return functools.partial(
            bag_of_items.normalised_bag,
            lowering=self.input_lowering,
            dtype=self.dtype,
            precision=self.precision,
            item_axis=self.item_axis,
            platform=self.platform,
        )

    def _encode(
        self,
        batch: SparseBatch,
        dropout: bag_of_items.Dropout | None,
        biases: list[jax.Array],
    ) -> jax.Array:
        """Returns the last encoder layer before its activation, float32."""
        h_BH = self.input_layer()(self.input_kernel, batch, dropout=dropout)
        h_BH = h_BH + biases[0]
        for layer, bias in zip(self.encoder, biases[1:]):
            h_BH = self._dense(self._activate(h_BH), layer, bias)
        return h_BH.astype(jnp.float32)

    def _decode(self, h_BH: jax.Array, biases: list[jax.Array]) -> jax.Array:
        """Returns the last hidden layer, the input of the output layer."""
        first = len(biases) - len(self.decoder)
        for layer, bias in zip(self.decoder, biases[first:]):
            h_BH = self._activate(self._dense(h_BH, layer, bias))
        return h_BH

    def _dropout(
        self, key: jax.Array, first_row: jax.Array | int
    ) -> bag_of_items.Dropout:
        return bag_of_items.Dropout(
            jax.random.key_data(key), self.dropout_rate, first_row
        )

    def _output_bias(self) -> jax.Array:
        return likelihood.mask_padding_items(
            self.output_bias, self.n_items, self.item_axis
        )

    def _nll(self, hidden_BH: jax.Array, batch: SparseBatch) -> jax.Array:
        return likelihood.multinomial_nll(
            hidden_BH,
            self.output_kernel,
            self._output_bias(),
            batch,
            dtype=self.dtype,
            precision=self.precision,
            item_axis=self.item_axis,
            block=self.item_block,
            platform=self.platform,
        )

    @classmethod
    def keys(cls, key: jax.Array) -> jax.Array:
        """Returns the keys of a step's draws: of the dropout alone."""
        return key[None]

    def loss_terms(
        self,
        batch: SparseBatch,
        keys: jax.Array,
        first_row: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the per-user (nll_B, kl_B), float32 [B]; kl_B is zero.

        `keys` are typed PRNG keys, and `first_row` is the row of the first
        user in the global batch.
        """
        biases = self._biases(batch.count_B.shape[0])
        dropout = self._dropout(keys[0], first_row)
        z_BZ = self._activate(self._encode(batch, dropout, biases))
        nll_B = self._nll(self._decode(z_BZ, biases), batch)
        return nll_B, jnp.zeros_like(nll_B)

    def encode(self, batch: SparseBatch) -> jax.Array:
        """Returns the users' representations, float32 [B, Z]."""
        # Not rounded, in any precision.
        activation = layers.ACTIVATIONS[self.activation]
        return activation.value(self._encode(batch, None, self._biases(None)))

    def scores(self, batch: SparseBatch) -> jax.Array:
        """Returns this shard's logits, float32 [B, I].

        Those of padding items mean nothing.
        """
        hidden_BH = self._decode(self.encode(batch), self._biases(None))
        output = hidden_BH, self.output_kernel
        policy = {"dtype": self.dtype, "precision": self.precision}
        if mesh_lib.on_cpu(self.platform):
            return likelihood.logits(*output, self.output_bias, **policy)
        # A GPU adds the bias in the kernel of the product, for one user too.
        bias_1I = self.output_bias[None, :]
        return layers.dense(*output, bias_1I, **policy, platform=self.platform)

    def __call__(self, batch: SparseBatch) -> jax.Array:
        """Returns `scores`; `init` traces this method."""
        return self.scores(batch)


class MultVAE(MultDAE):
    """Variational autoencoder with a multinomial likelihood (Mult-VAE^PR)."""

    CODES: ClassVar[int] = 2

    @classmethod
    def keys(cls, key: jax.Array) -> jax.Array:
        """Returns the keys of a step's draws: of the dropout and the noise."""
        return jax.random.split(key)

    def loss_terms(
        self,
        batch: SparseBatch,
        keys: jax.Array,
        first_row: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the per-user (nll_B, kl_B), float32 [B].

        These are the two terms of Liang et al. 2018, equation 7, estimated
        with one reparametrised sample of z (section 2.2.1).
        """
        biases = self._biases(batch.count_B.shape[0])
        dropout = self._dropout(keys[0], first_row)
        posterior = self._posterior(batch, dropout, biases)
        z_BZ = noise.sample_gaussian(*posterior, keys[1], first_row)
        kl_B = self._kl(batch, z_BZ, *posterior)
        return self._nll(self._decode(z_BZ, biases), batch), kl_B

    def _posterior(
        self,
        batch: SparseBatch,
        dropout: bag_of_items.Dropout | None,
        biases: list[jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (mean_BZ, log_variance_BZ), float32."""
        codes_BC = layers.round_gradient(
            self._encode(batch, dropout, biases),
            dtype=self.dtype,
            platform=self.platform,
        )
        mean_BZ, log_variance_BZ = jnp.split(codes_BC, 2, 1)
        return mean_BZ, log_variance_BZ

    def _kl(
        self, batch: SparseBatch, z_BZ: jax.Array, *posterior: jax.Array
    ) -> jax.Array:
        return losses.gaussian_kl(*posterior)

    def encode(self, batch: SparseBatch) -> jax.Array:
        """Returns the posterior means, float32 [B, Z]."""
        return self._posterior(batch, None, self._biases(None))[0]
