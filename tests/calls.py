"""Calls in the words of several libraries: what they make, and what that does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from octavo import optim, schedules

NAMES = {"optim": optim, "optax": optax, "schedules": schedules}

_RNG = np.random.default_rng(0)
# Small leaves keep 32 bits, so that numbers of the 8-bit names can be compared, too.
START = {
    "kernel": _RNG.normal(size=(8, 12)).astype(np.float32),
    "bias": _RNG.normal(size=12).astype(np.float32),
}
# From one column to the next ten times smaller: in some, every eps is all there is.
GRADS = [
    {
        name: (_RNG.normal(size=p.shape) * 10.0 ** -np.arange(12)).astype(np.float32)
        for name, p in START.items()
    }
    for _ in range(3)
]
# |p| < 3 is rounded once per step, by 2**-25 of 4 at most, here and there: 7e-7. The
# steps themselves are 0.3 in all, to 1e-6: 3e-7.
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def ours(call: str, **names: Any) -> Any:
    """The optimizer that a call makes."""
    return eval(call, {**NAMES, **names})


def stepped(transformations: list[Any]) -> list[dict[str, np.ndarray]]:
    """Parameters after a step with each of the gradients: one program for all."""

    def run(params: Any, grads: Any) -> list[Any]:
        results = []
        for tx in transformations:

            def body(carry: Any, g: Any, tx: Any = tx) -> Any:
                p, state = carry
                updates, state = tx.update(g, state, p)
                return (optax.apply_updates(p, updates), state), None

            (p, _), _ = jax.lax.scan(body, (params, tx.init(params)), grads)
            results.append(p)
        return results

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = jax.tree.map(jnp.asarray, START)
        grads = jax.tree.map(lambda *g: jnp.stack(g), *GRADS)
        return jax.tree.map(np.asarray, jax.jit(run)(params, grads))


def same(a: optim.Transformation, b: optim.Transformation) -> None:
    """That two optimizers are the same, numbers and options."""
    for field in ("hyperparameters", "learning_rate", "settings", "weight_decay"):
        assert getattr(a.optimizer, field) == getattr(b.optimizer, field), field
    assert a.optimizer.rule.slots == b.optimizer.rule.slots
    assert a.optimizer.rule.decay == b.optimizer.rule.decay
