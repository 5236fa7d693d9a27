"""RecVAE (Shenbin, Alekseev, Tutubalina, Malykh, Nikolenko, WSDM 2020).

RecVAE is a variational autoencoder with a multinomial likelihood. It differs
from Mult-VAE in

- a composite prior, which contains the posterior of an earlier encoder
  (section 3.2);
- a weight of the KL term per user, γ times the number of the user's
  interactions (section 3.3; `config.loss.gamma`);
- alternating training of the encoder, with dropout, and of the decoder,
  without (section 3.4; `config.train.alternating_epochs`);
- an encoder of densely connected layers with layer normalisation (section
  3.1), and a decoder of a single layer.

The authors' code supplies what the paper does not specify: the constants and
the initialisation.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vaecf.config import TrainConfig
from vaecf.errors import VaecfError
from vaecf.models import bag_of_items, layers, losses, mult_vae
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel.mesh import on_cpu

_DEPTH = 5  # layers of the encoder before mean and log-variance
_EPSILON = 0.1  # of the layer normalisation
_CODES = ("mean", "log_variance")  # the encoder's last layers


def _uniform(limit: float) -> Any:
    """Returns PyTorch's default initialiser; limit is 1 / sqrt(fan-in)."""
    return functools.partial(jax.random.uniform, minval=-limit, maxval=limit)


class Encoder(nn.Module):
    """Maps users' items to the mean and log-variance of their codes.

    h_k = LN(swish(W_k h_{k-1} + b_k + h_1 + ... + h_{k-1})), where h_0 is the
    normalised bag of items: figure 1 of the paper. Mean and log-variance are
    linear in the last layer. Attributes as in `mult_vae.MultDAE`, with one
    size `hidden` for all layers, and its `input_layer`.
    """

    n_items: int
    item_rows: int
    hidden: int
    latent: int
    dtype: Any
    precision: Any
    input_layer: Any

    platform: str | None = None

    @nn.compact
    def __call__(
        self, batch: SparseBatch, dropout: bag_of_items.Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (mean_BZ, log_variance_BZ), float32."""
        entry, size = self.n_items**-0.5, self.hidden
        inner = _uniform(size**-0.5)
        dense = functools.partial(
            layers.dense,
            dtype=self.dtype,
            precision=self.precision,
            platform=self.platform,
        )
        rounded, round_gradient = (
            functools.partial(f, dtype=self.dtype, platform=self.platform)
            for f in (layers.rounded, layers.round_gradient)
        )
        normalise = functools.partial(_normalise, platform=self.platform)
        kernel_IH = self.param(
            "input_kernel",
            mult_vae.uniform_items(self.n_items, 0, entry),
            (self.item_rows, size),
        )
        biases = [self.param("input_bias", _uniform(entry), (size,))]
        kernels, scales, shifts = [], [], []
        for name in (*(f"layer_{k}" for k in range(2, _DEPTH + 1)), *_CODES):
            width = self.latent if name in _CODES else size
            kernel, bias = layers.Layer(
                (size, width), inner, inner, name=name
            )()
            kernels.append(kernel)
            biases.append(bias)
        for k in range(1, _DEPTH + 1):
            init = (nn.initializers.ones, nn.initializers.zeros, "scale")
            scale, shift = layers.Layer((size,), *init, name=f"norm_{k}")()
            scales.append(scale)
            shifts.append(shift)
        n_users = None if dropout is None else batch.count_B.shape[0]
        biases, scales, shifts = layers.rows(
            (biases, scales, shifts),
            n_users,
            dtype=self.dtype,
            platform=self.platform,
        )
        h_BH = self.input_layer(kernel_IH, batch, dropout=dropout) + biases[0]
        h_BH = nn.swish(round_gradient(h_BH))
        h_BH = rounded(normalise(h_BH, scales[0], shifts[0]))
        sum_BH = h_BH  # of all layers so far
        for k in range(1, _DEPTH):
            layer_BH = dense(h_BH, kernels[k - 1], biases[k])
            h_BH = nn.swish(round_gradient(layer_BH + sum_BH))
            h_BH = rounded(normalise(h_BH, scales[k], shifts[k]))
            sum_BH = sum_BH + h_BH
        if n_users is None or on_cpu(self.platform):
            mean_BZ, log_variance_BZ = (
                dense(h_BH, *layer).astype(jnp.float32)
                for layer in zip(kernels[-2:], biases[-2:])
            )
        else:  # one product, and one for each gradient
            kernel_HC = jnp.concatenate(kernels[-2:], 1)
            codes_BC = bag_of_items.product(
                self.dtype, self.precision, h_BH, kernel_HC
            )
            codes_BZ = [
                code_BZ + bias
                for code_BZ, bias in zip(jnp.split(codes_BC, 2, 1), biases[-2:])
            ]
            # Joined, their gradient is one array for products and sums.
            codes_BC = round_gradient(jnp.concatenate(codes_BZ, 1))
            mean_BZ, log_variance_BZ = jnp.split(codes_BC, 2, 1)
        return mean_BZ, log_variance_BZ


def _normalise(
    x_BH: jax.Array, scale: jax.Array, shift: jax.Array, platform: str | None
) -> jax.Array:
    """Returns the layer normalisation (Ba et al. 2016) of each user's units.

    The variance is not E[x²] - E[x]², which suffers from cancellation.
    """
    mean_B1 = jnp.mean(x_BH, axis=1, keepdims=True)
    centred_BH = x_BH - mean_B1
    if on_cpu(platform):
        # The operations of `flax.linen.LayerNorm` in their order. Squaring
        # `centred_BH` would change the last bits of the gradient.
        variance_B1 = jnp.mean(jnp.square(x_BH - mean_B1), 1, keepdims=True)
        scale = lax.rsqrt(variance_B1 + _EPSILON) * scale
    else:  # fewer kernels
        variance_B1 = jnp.mean(jnp.square(centred_BH), 1, keepdims=True)
        centred_BH = centred_BH * lax.rsqrt(variance_B1 + _EPSILON)
    return centred_BH * scale + shift


class RecVAE(mult_vae.MultVAE):
    """RecVAE; see the module's docstring, and `mult_vae` for the contract.

    `hidden` has one size, which all encoder layers share. The activation is
    always swish; `activation` is ignored.
    """

    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "encoder": ("posterior",),
        "decoder": ("output_kernel", "output_bias"),
    }
    # The encoder of the composite prior; no step trains it.
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("prior",)

    @classmethod
    def phase(cls, epoch: int, config: TrainConfig) -> mult_vae.Phase:
        """Returns what an epoch trains: the encoder or the decoder.

        `config.alternating_epochs` epochs train the encoder and the decoder in
        alternation. Only the encoder is trained with dropout. The current
        encoder is copied into the composite prior (section 3.2) before each
        series of decoder epochs.
        """
        encoder_epochs, decoder_epochs = config.alternating_epochs
        position = epoch % (encoder_epochs + decoder_epochs)
        if position < encoder_epochs:
            return mult_vae.Phase("encoder")
        copies = (("posterior", "prior"),) if position == encoder_epochs else ()
        return mult_vae.Phase("decoder", dropout=False, copies=copies)

    def setup(self) -> None:
        """Creates parameters and layers; called by Flax."""
        if len(self.hidden) != 1:
            raise VaecfError(
                f"config.model.hidden={self.hidden}: rec_vae takes one size "
                "for all layers of its encoder"
            )
        # `prior` is a copy of an earlier encoder (see `phase`); at first it is
        # a random one.
        self.posterior, self.prior = (
            Encoder(
                self.n_items,
                self.item_rows,
                self.hidden[0],
                self.latent,
                self.dtype,
                self.precision,
                self.input_layer(),
                self.platform,
            )
            for _ in range(2)
        )
        self.decoder = []  # a single layer, the output layer
        limit = self.latent**-0.5
        self.output_kernel = self.param(
            "output_kernel",
            mult_vae.uniform_items(self.n_items, 1, limit),
            (self.latent, self.item_rows),
        )
        self.output_bias = self.param(
            "output_bias",
            mult_vae.uniform_items(self.n_items, 0, limit),
            (self.item_rows,),
        )

    def _posterior(
        self,
        batch: SparseBatch,
        dropout: bag_of_items.Dropout | None,
        biases: list[jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        return self.posterior(batch, dropout)

    def _biases(self, n_users: int | None) -> list[jax.Array]:
        return []  # `Encoder` has its own

    def _kl(
        self, batch: SparseBatch, z_BZ: jax.Array, *posterior: jax.Array
    ) -> jax.Array:
        """Returns log q(z | x) - log p(z | x, earlier encoder), float32 [B].

        Equations 5 and 6 of the paper, estimated with the sample z.
        """
        previous = self.prior(batch, None)
        log_q_B = jnp.sum(losses.log_normal(z_BZ, *posterior), axis=-1)
        return log_q_B - losses.composite_log_prior(z_BZ, *previous)

    def __call__(self, batch: SparseBatch) -> jax.Array:
        """Returns `scores`; `init` traces this method for all parameters."""
        self.prior(batch, None)
        return self.scores(batch)
