"""Muon: what it equals, where it runs, and what it refuses."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from matrices import NUMBERS, SHAPES, STEPS, expect_near, values
from optax.contrib import MuonDimensionNumbers as Numbers

from octavo import optim

# ------------------------------------------------------------------ optax, 32 bits

WAYS: list[dict[str, Any]] = [
    {},
    {"consistent_rms": 0.2, "weight_decay": 0.1, "adam_weight_decay": 0.1},
    {"nesterov": False, "beta": 0.9, "adam_learning_rate": 0.01},
    {"adaptive": True},
    {"preconditioning": "aol", "ns_steps": 4},
    {"preconditioning": "schatten"},
    {"preconditioning": "spectral", "ns_coeffs": "dion"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "defaults")
def test_32bit_equals_optax(way: dict[str, Any]) -> None:
    # With `adaptive`, optax sums over all matrices of a leaf, and Octavo over each.
    few = [k for k in SHAPES if len(SHAPES[k]) < 3] if "adaptive" in way else SHAPES
    start = {k: values(0, 0.1)[k] for k in few}
    numbers = {k: NUMBERS[k] for k in few}
    own = {"consistent_rms": None} | way
    ours = optim.muon32bit(0.1, muon_weight_dimension_numbers=numbers, **own)
    theirs = optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers, **way)
    found = [run(tx, start) for tx in (ours, theirs)]
    # Parameters of .1, moves of about 1: a rounding of 2**-24 in each step is 1e-6 of
    # the move. The rest is the order of sums in products, which iterations enlarge.
    expect_near(*found, start, 1e-5)


def run(tx: Any, start: Any) -> Any:
    """The parameters after 20 steps; optax' own code promotes types and ranks."""
    step = jax.jit(lambda p, s, g: optim.step(tx, g, s, p))
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        params, state = start, tx.init(start)
        for k in range(STEPS):
            params, state = step(params, state, {n: values(k + 1)[n] for n in start})
    return params


def test_moments_come_from_optax_and_go_back() -> None:
    start = values(0)
    ours = optim.muon32bit(0.1, muon_weight_dimension_numbers=NUMBERS)
    theirs = optax.contrib.muon(0.1, muon_weight_dimension_numbers=NUMBERS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _, state = jax.jit(theirs.update)(values(1), theirs.init(start), start)
    made = optim.from_optax(ours.init(start), state)
    back = optim.to_optax(made, theirs.init(start))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    with pytest.raises(ValueError, match=re.escape("not that of optax.contrib.muon")):
        optim.from_optax(made, optax.adam(0.1).init(start))


# ------------------------------------------------------------------------- 8 bits


def test_8bit_is_near_32bit() -> None:
    start = {name: values(0, 0.1)[name] for name in ("layer_0/kernel", "down")}
    exact, ours = run(optim.muon32bit(0.1), start), run(optim.muon8bit(0.1), start)
    for name in start:
        way = np.asarray(exact[name]) - np.asarray(start[name])
        error = np.asarray(ours[name]) - np.asarray(exact[name])
        # benchmarks/muon_formats.py: .03 of a step, and errors of steps average out.
        assert np.linalg.norm(error) < 0.03 * np.linalg.norm(way), name


def test_bytes_per_parameter() -> None:
    shapes = {"w": jax.ShapeDtypeStruct((4096, 1024), "float32")}
    report = optim.memory_report(optim.muon(0.1), shapes)
    assert round(report.bytes / report.parameters, 4) == 1.0157  # counters included
    short = optim.memory_report(optim.muon(0.1, block_size=32), shapes)
    assert round(short.bytes / short.parameters, 4) == 1.0625


def test_how_momentum_is_rounded_depends_on_its_decay() -> None:
    """Codes to the nearest stall above .969. Only a number is known inside of jit."""
    params = {"w": jax.ShapeDtypeStruct((4096, 256), jnp.float32)}

    def block(tx: Any) -> int:
        state = jax.eval_shape(tx.init, params)
        moments = optax.tree.get(state, "muon")
        assert list(moments.extra["format"]) == ["mu=mulaw8"]
        return 4096 // moments.mu_scale["w"].shape[0]

    assert [block(optim.muon(0.1, beta=b)) for b in (0.95, 0.96, 0.97)] == [
        128,
        128,
        32,
    ]
    inject = optax.inject_hyperparams
    assert block(inject(optim.muon)(0.1)) == 32
    assert block(inject(optim.muon, static_args="beta")(0.1)) == 128


# ---------------------------------------------------------------- which are matrices


def test_embeddings_heads_and_vectors_take_adamw() -> None:
    names = ["embed/w", "wte", "lm_head/kernel", "logits", "heads", "out/kernel", "b"]
    shapes = [(64, 8)] * 6 + [(8,)]
    params = {n: jnp.ones(s) for n, s in zip(names, shapes, strict=True)}
    state = optim.muon(0.1).init(params)
    assert set(state.muon.codes("mu").paths) == {"heads", "out/kernel"}
    assert set(state.adam.codes("nu").paths) == set(names) - {"heads", "out/kernel"}
    mask = {name: name == "wte" for name in names}
    state = optim.muon(0.1, muon_mask=mask).init(params)
    assert state.muon.codes("mu").paths == ("wte",)


def test_layers_may_be_stacked() -> None:
    stacked = {"w": values(0)["stack"], "n": jnp.ones((8, 32))}
    apart = {f"w{k}": stacked["w"][k] for k in range(8)}
    grads = {"w": values(1)["stack"], "n": jnp.ones((8, 32))}
    tx = optim.muon32bit(0.1, layer_axes=0)
    together, state = tx.step(grads, tx.init(stacked), stacked)
    assert state.muon.codes("mu").paths == ("w",)
    tx = optim.muon32bit(0.1)
    found, _ = tx.step(
        {f"w{k}": grads["w"][k] for k in range(8)}, tx.init(apart), apart
    )
    for k in range(8):
        np.testing.assert_allclose(together["w"][k], found[f"w{k}"], atol=1e-6)


def test_options_may_be_trees() -> None:
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64)), "c": jnp.ones(64)}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = optim.muon(
        0.1,
        state={"a": "32bit", "b": "8bit", "c": "32bit"},
        lr_scale={"a": 0.0, "b": 1.0, "c": 1.0},
        weight_decay_mask={"a": True, "b": False, "c": True},
        weight_decay={"a": 0.1, "b": 0.1, "c": 0.1},
    )
    state = tx.init(params)
    assert [state.muon.mu[k].dtype.name for k in "ab"] == ["float32", "int8"]
    after, _ = tx.step(grads, state, params)
    np.testing.assert_array_equal(after["a"], params["a"])
    assert not np.array_equal(after["b"], params["b"])
    assert (
        optim.muon(0.1, state={"mu": "bf16", "nu": "32bit"})
        .init(params)
        .muon.mu["a"]
        .dtype
        == jnp.bfloat16
    )


# --------------------------------------------------------------- options of all leaves


def test_limits_see_all_leaves() -> None:
    params, grads = values(0), values(1)
    rest = {"adam_b1": 0.0, "eps": 0.1}
    ours = optim.muon32bit(0.1, grad_clip_norm=1.0, **rest)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optim.muon32bit(0.1, **rest))
    found, _ = optim.step(ours, grads, ours.init(params), params)
    wanted, _ = optim.step(theirs, grads, theirs.init(params), params)
    expect_near(found, wanted, params, 1e-4)  # eps=.1: sensitive to the factor


def test_bad_steps_are_skipped_whole() -> None:
    params, grads = values(0), values(1)
    grads["bias"] = grads["bias"].at[0].set(jnp.nan)
    tx = optim.muon(0.1, skip_nonfinite=True)
    state = tx.init(params)
    after, skipped = jax.jit(tx.step)(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    jax.tree.map(np.testing.assert_array_equal, skipped.muon.mu, state.muon.mu)
    for part in skipped:
        assert part.extra["skipped"] == 1 and part.count == 0


def test_one_nan_does_not_spread() -> None:
    params, grads = values(0), values(1)
    grads["down"] = grads["down"].at[3, 5].set(jnp.nan)
    tx = optim.muon(0.1)
    after, state = jax.jit(tx.step)(grads, tx.init(params), params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, state)))


@pytest.mark.parametrize("weights", ["stochastic", "remainder8", "remainder16"])
def test_bfloat16_weights_take_small_steps(weights: str) -> None:
    start = {"w": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones(64, jnp.bfloat16)}
    grads = {"w": jnp.eye(64, dtype=jnp.bfloat16), "b": jnp.ones(64, jnp.bfloat16)}
    tx = optim.muon(1e-4, weights=weights)
    params, state = start, tx.init(start)
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    for _ in range(40):
        params, state = step(params, state, grads)
    # 40 steps of 1e-4 * .2 * 8 on the diagonal, times singular values of .7 to 1.2:
    # 1.6 units of bfloat16 below 1, which are 2**-8. To the nearest, nothing moves.
    moved = 1 - np.mean(np.diag(np.asarray(params["w"], np.float32)))
    assert 0.5 * 0.0064 < moved < 1.4 * 0.0064


def test_update_is_the_step() -> None:
    params, grads = values(0), values(1)
    tx = optim.muon(0.1, weight_decay=0.1)
    state = tx.init(params)
    updates, one = jax.jit(tx.update)(grads, state, params)
    after, two = jax.jit(tx.step)(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    expect_near(optax.apply_updates(params, updates), after, params, 1e-5)
    with pytest.raises(ValueError, match="needs the current parameters"):
        tx.update(grads, state)


def test_products_in_bfloat16() -> None:
    params = {"w": jnp.zeros((64, 128))}
    grads = {"w": values(1)["layer_0/kernel"]}
    steps = []
    for dtype in (None, jnp.bfloat16):
        tx = optim.muon(1.0, ns_dtype=dtype)
        after, _ = tx.step(grads, tx.init(params), params)
        steps.append(after["w"])
    error = np.linalg.norm(steps[1] - steps[0]) / np.linalg.norm(steps[0])
    assert 1e-3 < error < 0.1  # docs/optimizers/muon.md says .06


def test_explain_names_what_runs() -> None:
    params = {"w": jax.ShapeDtypeStruct((4096, 512), "float32"), "b": jnp.ones(8)}
    rows = optim.explain(optim.muon(0.1), params, platform="tpu").rows
    assert [(r.path, r.backend) for r in rows] == [("b", "xla"), ("w", "tpu")]


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ns_steps": 0}, "ns_steps=0 must be 1 or more"),
        ({"ns_steps": 2.0}, "ns_steps=2.0 must be an int"),
        ({"ns_steps": 3, "ns_coeffs": "dion"}, "ns_steps=3 with 5 rows of ns_coeffs"),
        ({"ns_coeffs": "muon"}, "must be one of 'standard', 'dion', three numbers"),
        ({"ns_coeffs": (1.0, 2.0)}, "three numbers"),
        ({"preconditioning": "none"}, "unknown preconditioning 'none'"),
        ({"beta": 1.0}, "beta=1.0 must be in [0, 1)"),
        ({"consistent_rms": 0}, "consistent_rms=0 must be above 0"),
        ({"ns_dtype": jnp.int8}, "a type of floating numbers"),
        ({"adam_b2": 1.0}, "b2=1.0"),
        ({"max_unorm": 1.0}, "max_unorm=1.0: muon does not have it"),
        ({"record_norms": True}, "record_norms=True: muon does not have it"),
        (
            {"muon_mask": True, "muon_weight_dimension_numbers": Numbers()},
            "give one of them",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.muon(0.1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"muon_mask": {"w": True, "b": True}}, "muon_mask is True for 'b'"),
        ({"muon_mask": {"w": True, "b": None}}, "muon_mask at 'b' is None"),
        ({"muon_weight_dimension_numbers": Numbers()}, "'b', shape (8,)"),
        (
            {"muon_weight_dimension_numbers": {"w": Numbers(0, 2), "b": None}},
            "'w', shape (4, 8), float32, is MuonDimensionNumbers(reduction_axis=0, "
            "output_axis=2): its axes are 0 to 1",
        ),
        (
            {"muon_weight_dimension_numbers": {"w": Numbers(1, -1), "b": None}},
            "an axis is named twice",
        ),
        (
            {"muon_weight_dimension_numbers": {"w": 3, "b": None}},
            "at 'w' is 3, not MuonDimensionNumbers",
        ),
        (
            {
                "muon_weight_dimension_numbers": {"w": Numbers(), "b": None},
                "layer_axes": {"w": 0, "b": None},
            },
            "layer_axes=(0,) stack whole matrices",
        ),
    ],
)
def test_leaves_that_are_no_matrices(arguments: dict[str, Any], message: str) -> None:
    params = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.muon(0.1, **arguments).init(params)


def test_states_of_others_are_refused() -> None:
    params = {"w": jnp.ones((4, 8))}
    state = optim.adamw(0.1).init(params)
    with pytest.raises(ValueError, match=r"the state is a State, not optim\.muon's"):
        optim.muon(0.1).step(params, state, params)


def test_argument_names_are_those_of_optax() -> None:
    theirs = set(inspect.signature(optax.contrib.muon).parameters)
    ours = set(inspect.signature(optim.muon).parameters)
    # `state` is the first, and the second is 0 wherever anybody has it.
    assert theirs - ours == {"mu_dtype", "adam_eps_root"}
    # Of any other default optax.inject_hyperparams would make an array.
    defaults = [p.default for p in inspect.signature(optim.muon).parameters.values()]
    assert not [x for x in defaults if type(x) is int]
