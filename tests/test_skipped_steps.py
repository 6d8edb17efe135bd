"""`skip_nonfinite`: a bad gradient anywhere leaves everything as it was."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octavo import optim

from bits import assert_same_bits, bits
from cases import KINDS
from limits import KEEPS, everything, limited, tree
from training import run_step

every_optimizer = pytest.mark.parametrize("name", KINDS)


def copied(tree: Any) -> Any:
    """Arrays of its own, that may be donated."""
    return jax.tree.map(jnp.array, tree)


def kept(params: Any, state: optim.State) -> tuple[Any, optim.State]:
    """What a step that is not taken must leave alone."""
    extra = {k: v for k, v in state.extra.items() if k != "skipped"}
    return params, state._replace(extra=extra)


# One value in one leaf: with blocks, without, and 0-d.
BAD: list[Callable[[Any], Any]] = [
    lambda g: {**g, "dense": {**g["dense"], "kernel": _spoil(g, "kernel", np.nan)}},
    lambda g: {**g, "dense": {**g["dense"], "kernel": _spoil(g, "kernel", np.inf)}},
    lambda g: {**g, "dense": {**g["dense"], "bias": _spoil(g, "bias", -np.inf)}},
    lambda g: {**g, "scale": jnp.full_like(g["scale"], np.nan)},
]


def _spoil(g: Any, name: str, value: float) -> Any:
    """The last value of a leaf replaced."""
    leaf = g["dense"][name]
    return leaf.at[(-1,) * leaf.ndim].set(value)


@pytest.mark.parametrize(
    ("call", "dtype"),
    [("step", "float32"), ("update", "float32"), ("step", "bfloat16")],
)
@pytest.mark.parametrize("options", ["alone", "with everything"])
@every_optimizer
def test_a_bad_gradient_anywhere_changes_nothing_anywhere(
    name: str, call: str, options: str, dtype: str
) -> None:
    """Bit for bit, and the next step is taken as if there had been none."""
    params, (first, second) = tree(2, dtype)
    params["dense"]["bias"] = params["dense"]["bias"].at[0].set(-0.0)
    given = KEEPS["skipped"] if options == "alone" else everything(name)
    tx = limited(name, 0.01, **given)

    def take(params: Any, state: Any, g: Any) -> Any:
        if call == "step":
            return tx.step(g, state, params)
        updates, state = tx.update(g, state, params)
        assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
        return optax.apply_updates(params, updates), state

    step = jax.jit(take, donate_argnums=(0, 1))
    fresh = (params, tx.init(params))
    for before, good in (
        (fresh, first),
        (step(*copied(fresh), first), second),
    ):
        expected = step(*copied(before), good)
        for k, spoiled in enumerate(bad(good) for bad in BAD):
            carry = step(*copied(before), spoiled)
            assert_same_bits(kept(*carry), kept(*before))
            assert carry[1].extra["skipped"] == 1, k
        carry = step(*carry, spoiled)
        assert carry[1].extra["skipped"] == 2
        after = step(*carry, good)
        assert after[1].extra["skipped"] == 2
        assert_same_bits(kept(*after), kept(*expected))
        moved = jax.tree.map(lambda a, b: bits(a) != bits(b), after[0], before[0])
        assert any(x.any() for x in jax.tree.leaves(moved))


@every_optimizer
def test_updates_of_a_skipped_step_are_zeros(name: str) -> None:
    params, (g,) = tree()
    tx = limited(name, 0.01, **everything(name))
    update = jax.jit(tx.update)
    for bad in BAD:
        updates, _ = update(bad(g), tx.init(params), params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_finite_gradients_are_not_skipped_however_large() -> None:
    """Their squares overflow: their blocks are kept, as always, and others step."""
    params, (g,) = tree()
    g["dense"]["kernel"] = g["dense"]["kernel"].at[0, 0].set(1e30)
    after, state = run_step(optim.adamw(0.01, skip_nonfinite=True), params, [g])
    assert state.extra["skipped"] == 0 and state.count == 1
    assert (after["dense"]["kernel"] != params["dense"]["kernel"]).mean() > 0.99
