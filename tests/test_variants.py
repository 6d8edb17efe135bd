"""Compiled or not, from arrays of a device or of numpy: equal trees, traced once."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from octavo import optim

from cases import OPTIMIZERS, RULES

RNG = np.random.default_rng(0)
# A leaf that is quantized, and one that is not.
PARAMS: dict[str, np.ndarray] = {
    "kernel": RNG.normal(size=(40, 6)).astype(np.float32),
    "bias": RNG.normal(size=6).astype(np.float32),
}
GRADS = jax.tree.map(lambda p: RNG.normal(size=p.shape).astype(np.float32), PARAMS)


def make(rule: str, rate: Any = 0.1, **options: Any) -> optim.Transformation:
    """The optimizer of a row, with options that override the row's."""
    kwargs = {**RULES[rule].kwargs, "min_quantized_size": 64, **options}
    return RULES[rule].ours(rate, **kwargs)


@functools.cache
def by_hand(rule: str) -> tuple[Any, dict[str, Any]]:
    """A fresh state, and what `step` and `update` give where nothing is around them."""
    tx = make(rule)
    state = tx.init(PARAMS)
    calls = {"step": tx.step, "update": tx.update}
    return state, {name: call(GRADS, state, PARAMS) for name, call in calls.items()}


class TestVariants(chex.TestCase):
    """Every function of every optimizer, against itself as it is called by hand."""

    variant: Callable[..., Any]

    @chex.variants(
        with_jit=True, without_jit=True, with_device=True, without_device=True
    )
    @parameterized.parameters(*OPTIMIZERS)
    def test_equal_trees(self, rule: str) -> None:
        tx = make(rule)
        state, results = by_hand(rule)
        chex.assert_trees_all_equal(self.variant(tx.init)(PARAMS), state)
        for name, expected in results.items():
            got = self.variant(getattr(tx, name))(GRADS, state, PARAMS)
            chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
            # Parameters are below 4. One program contracts a product and a sum to one
            # operation, and another does not: a rounding more here and there.
            chex.assert_trees_all_close(got[0], expected[0], rtol=0.0, atol=2.0**-22)
            for field, tree in got[1].trees.items():
                like = expected[1].trees[field]
                chex.assert_trees_all_equal(tree["kernel"], like["kernel"])
                chex.assert_trees_all_close(tree["bias"], like["bias"], rtol=2.0**-22)


def schedule_of(rate: Any) -> Callable[[Any], Any]:
    """One whose numbers are operands."""
    return lambda count: rate / (1.0 + count.astype(jnp.float32))


# What changes from call to call, as arguments of an optimizer.
CHANGING: dict[str, Callable[[Any], dict[str, Any]]] = {
    "rate": lambda x: {"rate": x},
    "schedule": lambda x: {"rate": schedule_of(x)},
    "lr_scale": lambda x: {"lr_scale": {"kernel": x, "bias": 1.0}},
    "weight_decay": lambda x: {"weight_decay": {"kernel": x, "bias": 0.0}},
}


@pytest.mark.parametrize("what", CHANGING)
@pytest.mark.parametrize("rule", ["adamw", "lars"])
def test_what_changes_is_traced_once(rule: str, what: str) -> None:
    """And changes the step, as much as when it is written as a number."""
    chex.clear_trace_counter()

    def arguments(x: Any) -> dict[str, Any]:
        return {"state": "32bit", **CHANGING[what](x)}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(x: Any, state: Any) -> Any:
        return make(rule, **arguments(x)).step(GRADS, state, PARAMS)[0]

    state = make(rule, state="32bit").init(PARAMS)
    found = [step(x, state) for x in (0.25, 0.5)]
    assert (found[0]["kernel"] != found[1]["kernel"]).any()
    # Written as a number, half an ulp of |p| < 4 here and there.
    written, _ = make(rule, **arguments(0.5)).step(GRADS, state, PARAMS)
    chex.assert_trees_all_close(found[1], written, rtol=0.0, atol=2.0**-21)
