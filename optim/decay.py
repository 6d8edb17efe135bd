"""Decoupled weight decay, for any rule."""

from typing import Any

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Rule


def decayed(rule: Rule, weight_decay: Any) -> Rule:
    """The rule with u + weight_decay * p in place of u (arXiv 1711.05101)."""

    def scalars(t: jax.Array) -> tuple[Any, jax.Array]:
        return rule.scalars(t), jnp.asarray(weight_decay, jnp.float32)

    def direction(
        g: jax.Array,
        p: jax.Array | None,
        slots: tuple[jax.Array, ...],
        s: tuple[Any, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        inner, decay = s
        u, slots = rule.direction(g, p, slots, inner)
        assert p is not None
        return u + decay * p, slots

    return Rule(rule.slots, scalars, direction, needs_params=True)
