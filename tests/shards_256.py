"""Run by test_min_shards.py: 4,096 rows over 256 devices made of the CPU, in Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

from octavo import optim

jax.config.update("jax_num_cpu_devices", 256)
MESH = jax.make_mesh((256,), ("d",), (AxisType.Auto,))
TX = optim.adamw(1e-3, min_shards=256)


class Model(nnx.Module):
    """A matrix of nnx."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        init = nnx.with_partitioning(nnx.initializers.ones_init(), ("d", None))
        self.dense = nnx.Linear(4096, 256, use_bias=False, kernel_init=init, rngs=rngs)


def of_nnx() -> jax.Array:
    """Scales as nnx' Optimizer makes them."""
    optimizer = nnx.Optimizer(Model(nnx.Rngs(0)), TX, wrt=nnx.Param)
    return optimizer.opt_state.mu_scale["dense"]["kernel"].get_raw_value()


def of_linen() -> jax.Array:
    """Scales with the sharding that linen's metadata gives them."""
    init = nn.with_partitioning(nn.initializers.ones_init(), ("d", None))
    dense = nn.Dense(256, kernel_init=init)

    def make() -> optim.State:
        return TX.init(dense.init(jax.random.key(0), jnp.ones((1, 4096)))["params"])

    shardings = nn.get_sharding(jax.eval_shape(make), MESH)
    return jax.jit(make, out_shardings=shardings)().mu_scale["kernel"].value


if __name__ == "__main__":
    with jax.set_mesh(MESH):
        for scales in (of_nnx(), of_linen()):
            print(scales.shape, scales.addressable_shards[0].data.shape)
