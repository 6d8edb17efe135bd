"""A small decoder-only transformer over bytes, and its loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn


class Block(nn.Module):
    """Causal attention and a feed-forward network, each on a normalized residual."""

    heads: int
    out_scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, time, width] to the same."""
        batch, length, width = x.shape
        out_init = nn.initializers.variance_scaling(self.out_scale, "fan_in", "normal")
        out = partial(nn.Dense, width, kernel_init=out_init)

        h = nn.Dense(3 * width, use_bias=False, name="qkv")(nn.RMSNorm()(x))
        h = h.reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = rotate(h[:, :, 0]), rotate(h[:, :, 1]), h[:, :, 2]
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + out(name="attention_out")(h.reshape(x.shape))

        h = nn.gelu(nn.Dense(4 * width, name="mlp_in")(nn.RMSNorm()(x)))
        return x + out(name="mlp_out")(h)


class Transformer(nn.Module):
    """Bytes to the logits of the bytes that follow."""

    width: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, time] to [batch, time, 256]."""
        x = nn.Embed(256, self.width, embedding_init=nn.initializers.normal(1.0))(
            tokens
        )
        for i in range(self.layers):
            x = Block(self.heads, 1 / (2 * self.layers), name=f"block_{i}")(x)
        return nn.Dense(256, name="logits")(nn.RMSNorm()(x))


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of [batch, time, head, feature]."""
    half = x.shape[-1] // 2
    frequencies = np.float32(1e4) ** (-np.arange(half, dtype=np.float32) / half)
    angles = np.arange(x.shape[1], dtype=np.float32)[:, None, None] * frequencies
    cos, sin = np.cos(angles)[None], np.sin(angles)[None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def loss_of(params: Any, apply: Callable[..., jax.Array], rows: jax.Array) -> jax.Array:
    """Mean cross entropy of each byte given those before it, in nats.

    Computed in float32, whatever weights are stored in: so nothing else differs.
    """
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    logits = apply({"params": params}, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()
