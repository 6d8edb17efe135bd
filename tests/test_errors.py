"""Bad input gets an error that says what was given, what is allowed, and where."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from octavo import optim

PARAMS = {"a": {"kernel": jnp.ones((64, 128))}, "b": jnp.ones(8)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "7bit"}, r"unknown state format '7bit'; known are '32bit', 'bf16'"),
        ({"state": {"mu": "8bit"}}, r"one for each slot, like \{'mu': '8bit', 'nu'"),
        ({"state": {"mu": "8bit", "nu": "no"}}, "unknown state format 'no'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; known are 'xla', 'tpu', 'tri"),
        ({"block_size": 12}, "block_size=12 must be a positive multiple of 8"),
        ({"block_size": 0}, "block_size=0 must be"),
        ({"block_size": -32}, "block_size=-32 must be"),
        ({"block_size": 32.0}, "block_size=32.0 must be an int"),
        ({"min_quantized_size": "4k"}, "min_quantized_size='4k' must be an int"),
        ({"seed": 1.5}, "seed=1.5 must be an int"),
        ({"b1": 1.0}, r"b1=1.0 must be in \[0, 1\)"),
        ({"b2": -0.1}, r"b2=-0.1 must be in \[0, 1\)"),
        ({"b2": float("nan")}, r"b2=nan must be in \[0, 1\)"),
        ({"eps": -1e-8}, "eps=-1e-08 must be finite and not negative"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be finite and not neg"),
    ],
)
def test_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.adamw(1e-3, **options)


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(TypeError, match="unknown option 'stat'; the options are state"):
        optim.adam(1e-3, stat="8bit")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_axis": 2},
            r"block_axis=2 for 'a/kernel' is not an axis of .*\(64, 128",
        ),
        ({"block_size": lambda path: 20}, "block_size=20 for 'a/kernel'"),
        ({"state": lambda path: "1bit"}, "unknown state format '1bit' for 'a/kernel'"),
    ],
)
def test_per_leaf_options_name_the_leaf(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.adam(1e-3, **options).init(PARAMS)


def changed(path: str, leaf: Any) -> Any:
    grads = jax.tree.map(lambda p: p, PARAMS)
    if path == "b":
        return {**grads, "b": leaf}
    return {**grads, "a": {path: leaf}}


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (
            changed("kernel", jnp.ones((64, 64))),
            r"'a/kernel': gradient \(64, 64\), but",
        ),
        (
            changed("weight", jnp.ones((64, 128))),
            "first difference at 'a/weight', where",
        ),
        ({"a": PARAMS["a"]}, "first difference at None, where the state has 'b'"),
        (changed("b", jnp.ones(8, jnp.int32)), "'b': gradient type int32, but"),
        (changed("b", jnp.ones(8, jnp.complex64)), "'b': gradient type complex64"),
    ],
)
@pytest.mark.parametrize("call", ["update", "step"])
def test_gradients_that_do_not_fit(call: str, grads: Any, message: str) -> None:
    tx = optim.adam(1e-3)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(getattr(tx, call), grads, tx.init(PARAMS), PARAMS)


def test_parameters_that_do_not_fit() -> None:
    tx = optim.adamw(1e-3)
    with pytest.raises(ValueError, match="tree of params does not fit"):
        tx.update(PARAMS, tx.init(PARAMS), {"a": PARAMS["a"]})


def test_update_without_the_parameters_that_a_rule_needs() -> None:
    tx = optim.adamw(1e-3)
    with pytest.raises(ValueError, match=r"needs the current parameters: call tx\.upd"):
        tx.update(PARAMS, tx.init(PARAMS))
    adam = optim.adam(1e-3)
    adam.update(PARAMS, adam.init(PARAMS))  # does not need them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "32bit"}, "state.scales has"),
        (
            {"state": "dynamic8"},
            r"\['mu_log8-nu_root8'\], but this .* \['mu_dynamic8-nu",
        ),
        (
            {"block_size": 8},
            r"'a/kernel': scales of shape \(16, 128\), but .*\(16, 128",
        ),
        (
            {"block_axis": 1},
            r"'a/kernel': scales of shape \(16, 128\), but.*\(64, 16\)",
        ),
        ({"min_quantized_size": 10**6}, "'a/kernel': state of type int8, but.*float32"),
    ],
)
def test_state_of_another_configuration(options: dict[str, Any], message: str) -> None:
    state = optim.adam(1e-3).init(PARAMS)
    other = optim.adam(1e-3, **options)
    if options == {"block_size": 8}:  # equal here: the leaf is small, 16 blocks of 4
        other.update(PARAMS, state)
        return
    with pytest.raises(ValueError, match=message):
        other.update(PARAMS, state)


def test_mask_that_does_not_fit() -> None:
    tx = optim.adamw(1e-3, mask={"a": True, "c": False})
    with pytest.raises(ValueError, match="mask does not fit the parameters at 'b'"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
