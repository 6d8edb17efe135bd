"""What corrects the bias of a mean that starts at zero."""

import jax
import jax.numpy as jnp


def bias_correction(b: jax.Array, t: jax.Array) -> jax.Array:
    """1 - b**t, by which a mean with decay b is divided after t steps."""
    # 1 - b**t loses all digits for b near 1; this loses none.
    return -jnp.expm1(t * jnp.log(b))
