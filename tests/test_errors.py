"""Bad input gets an error that says what was given, what is allowed, and where."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from octavo import optim
from octavo.optim import checks

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
        ({"grad_clip_norm": 0.0}, "grad_clip_norm=0.0 must be above 0, or None"),
        ({"grad_clip_norm": -1}, "grad_clip_norm=-1 must be above 0, or None"),
        ({"grad_clip_value": 0}, "grad_clip_value=0 must be above 0, or None"),
        ({"max_unorm": float("nan")}, "max_unorm=nan must be above 0, or None"),
        ({"percentile_clipping": 0}, "percentile_clipping=0 must be from 1 to 100"),
        ({"percentile_clipping": 101}, "percentile_clipping=101 must be from 1 to"),
        ({"percentile_clipping": 5.0}, "percentile_clipping=5.0 must be an int"),
        ({"percentile_clipping": True}, "percentile_clipping=True must be an int"),
    ],
)
def test_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.adamw(1e-3, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -1.0}, "eps=-1.0 must be finite and not negative"),
        (
            {"trust_ratio_bounds": (10.0, 0.1)},
            r"trust_ratio_bounds=\(10.0, 0.1\) must be \(low, high\), 0 <= low <= high",
        ),
        ({"ratio_bounds": (-1.0, 1.0)}, r"ratio_bounds=\(-1.0, 1.0\) must be \(low"),
        ({"ratio_bounds": (0.0, float("nan"))}, r"ratio_bounds=\(0.0, nan\) must be"),
        ({"ratio_bounds": 10.0}, r"ratio_bounds=10.0 must be \(low, high\), or None"),
        ({"ratio_bounds": (0.1, 1, 10)}, r"ratio_bounds=\(0.1, 1, 10\) must be \(low"),
    ],
)
def test_of_lamb(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.lamb(1e-3, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum=-0.1 must be in \[0, 1\)"),
        ({"dampening": 1.0}, r"dampening=1.0 must be in \[0, 1\)"),
        ({"trust_coefficient": -1.0}, "trust_coefficient=-1.0 must be finite and not"),
        (
            {"nesterov": True, "momentum": 0.0},
            "nesterov=True with momentum=0.0: it needs momentum above 0 and dampening",
        ),
        (
            {"nesterov": True, "dampening": 0.1},
            "nesterov=True with dampening=0.1: it needs momentum above 0 and dampening",
        ),
        (
            {"decay_norm": "both"},
            "decay_norm='both' must be 'together' or 'apart'",
        ),
        (
            {"max_unorm": 0.02},
            r"max_unorm=0.02: LARS' ratio .* write optim.preset\('lars-bitsandbytes', ",
        ),
    ],
)
def test_of_lars(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.lars(1e-3, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"dampening": -0.1}, r"dampening=-0.1 must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be finite and not negative"),
        ({"nesterov": 1}, "nesterov=1 must be True or False"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov=True with momentum=0.0: it"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "nesterov=True with dampening=0.1: it",
        ),
        ({"dampening": 0.1}, "dampening=0.1 without momentum: there is nothing to"),
        (
            {"record_norms": True},
            "record_norms=True: an optimizer that keeps no moments",
        ),
    ],
)
def test_of_sgd(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.sgd(1e-3, **arguments)


def test_leaves_with_one_path_are_told_apart_by_nothing() -> None:
    params = {"a/b": jnp.ones(3), "a": {"b": jnp.ones(4)}}
    with pytest.raises(ValueError, match="2 leaves have the path 'a/b'"):
        optim.adam(1e-3).init(params)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown preset 'lamb'; known are ") as error:
        optim.preset("lamb", 1e-3)
    assert all(name in str(error.value) for name in optim.PRESETS)


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
        (
            {"layer_axes": 1},
            r"layer_axes=1 for 'b' is not an axis of its shape \(8,\)",
        ),
        (
            {"layer_axes": lambda path: -3 if path == "a/kernel" else None},
            r"layer_axes=-3 for 'a/kernel' is not an axis of its shape \(64, 128\)",
        ),
        (
            {"layer_axes": {"a": (0, 2), "b": None}},
            r"layer_axes=\(0, 2\) for 'a/kernel' is not an axis",
        ),
        ({"layer_axes": 0.0}, "layer_axes is 0.0, not ints, tuples of ints, or None"),
        (
            {"layer_axes": {"a": {"kernel": "0"}, "b": 0}},
            "layer_axes at 'a/kernel' is '0', not ints",
        ),
        (
            {"layer_axes": lambda path: "0"},
            "layer_axes for 'a/kernel' is '0', not ints",
        ),
        ({"layer_axes": {"a": 0}}, "layer_axes does not fit the parameters at 'b'"),
        (
            {"layer_axes": 0, "block_axis": -2},
            "block_axis=-2 for 'a/kernel' is one of its layer_axes=0: a block would",
        ),
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


def test_states_of_others() -> None:
    tx, params = optim.adam(1e-3), {"w": jnp.ones((64, 128))}
    with pytest.raises(ValueError, match="the state is a tuple, not that of an Octavo"):
        tx.update(params, (), params)
    with pytest.raises(ValueError, match=r"state has .*'trace'.*, but .*'mu', 'mu_sc"):
        tx.update(params, optim.sgd(1e-3, 0.9).init(params), params)


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
        (
            {"state": "32bit"},
            r"state has .*'mu_scale', 'nu', 'nu_scale'\], but .*'mu', 'nu'\]: it was",
        ),
        (
            {"state": "dynamic8"},
            r"\['mu=ratio8,nu=bits8'\], but this .* \['mu=dynamic8,nu=dynamic8u'\]",
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


@pytest.mark.parametrize("name", ["mask", "adapt_mask"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": True, "c": False}, "does not fit the parameters at 'b': give a tree"),
        ({"a": True}, "does not fit the parameters at 'b'"),
        ({"a": {"bias": True}, "b": True}, "does not fit the parameters at 'a/kernel'"),
        ({"a": True, "b": {"c": True}}, "does not fit the parameters at 'b"),
        ({"a": 1.0, "b": True}, "at 'a' is 1.0, not bools"),
        ({"a": {"kernel": "yes"}, "b": True}, "at 'a/kernel' is 'yes', not bools"),
        (lambda params: {"a": True, "b": None}, "at 'b' is None, not bools"),
        (lambda params: jax.tree.map(jnp.any, params), "at 'a/kernel' is Array.*bools"),
    ],
)
def test_masks_that_do_not_fit(name: str, mask: Any, message: str) -> None:
    tx = optim.lamb(1e-3, **{name: mask})
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def direct(tx: optim.Transformation, p: Any) -> int:
    """A step, outside of jit. This and the others return the line that takes it."""
    state = tx.init(p)
    tx.step(p, state, p)
    return line_above()


def jitted(tx: optim.Transformation, p: Any) -> int:
    """`jax.jit` of the function itself."""
    state, step = tx.init(p), jax.jit(tx.step)
    step(p, state, p)
    return line_above()


def chained(tx: optim.Transformation, p: Any) -> int:
    """Within `optax.chain`, within `jax.jit`."""
    chain = optax.chain(optax.clip_by_global_norm(1.0), tx)
    state, update = chain.init(p), jax.jit(chain.update)
    update(p, state, p)
    return line_above()


def in_a_function(tx: optim.Transformation, p: Any) -> int:
    """Where the user's own function is compiled, its line is the innermost."""
    lines = []

    @jax.jit
    def train(p: Any) -> Any:
        out = optim.step(tx, p, tx.init(p), p)
        lines.append(line_above())
        return out

    train(p)
    return lines[0]


def line_above() -> int:
    """The number of the line above that which calls this."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno - 1


@pytest.mark.parametrize("call", [direct, jitted, chained, in_a_function])
def test_warnings_name_the_users_line_once(
    call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # of several: a warning
    monkeypatch.setattr(checks, "_given", set())
    tx, p = optim.adamw(1e-3), {"w": jnp.ones((64, 128))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = call(tx, p)
        call(tx, p)
    (warned,) = caught
    assert "Write tx = tx.bind(params)" in str(warned.message)
    assert (warned.filename, warned.lineno) == (__file__, line)
