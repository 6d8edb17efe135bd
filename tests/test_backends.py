"""The kernels compute what XLA computes: in both interpreters, on every format."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from octavo import optim
from octavo.optim import checks
from octavo.pallas_kernels import PLATFORMS, Leaf, choose
from octavo.pallas_kernels.backends import _memory

from cases import FORMATS, OPTIMIZERS, RULES, SHAPES, params_and_grads
from kernels import (
    BACKENDS,
    INTERPRETERS,
    expect_equal_up_to_contraction,
    interpreted,
    leaf_of,
    program_of,
)

# For all formats and shapes: two moments, and decay. The others take one leaf each.
USUAL = "adamw"


def make(rule: str, **options: Any) -> optim.Transformation:
    """A row of `RULES`, at a usual rate, that quantizes every leaf."""
    case = RULES[rule]
    return case.ours(0.01, **case.kwargs, min_quantized_size=0, **options)


def run(
    tx: optim.Transformation, shape: tuple[int, ...], steps: int, in_place: bool = True
) -> Leaf:
    """What a few steps from zero state make of a leaf, the last one maybe an update."""
    p, grads = params_and_grads(shape, steps)
    state, step = tx.init(p), jax.jit(tx.step)
    for g in grads[:-1]:
        p, state = step(g, state, p)
    out, state = jax.jit(tx.step if in_place else tx.update)(grads[-1], state, p)
    return leaf_of(out, state) if in_place else leaf_of(None, state, g=out)


def expect_equal_to_xla(
    backend: str, rule: str, shape: tuple[int, ...], in_place: bool, **options: Any
) -> None:
    """A backend's leaf is that of XLA after some steps.

    One where moments see parameters: a last bit of those is one of theirs next time.
    """
    steps = 3 if in_place and RULES[rule].pure else 1
    leaves = [
        run(make(rule, backend=name, **options), shape, steps, in_place)
        for name in (backend, "xla")
    ]
    expect_equal_up_to_contraction(*leaves)


# The simulator is slow: it takes the default format, in place.
CASES = [
    (name, state, in_place)
    for name in BACKENDS
    for state in FORMATS
    for in_place in (True, False)
    if in_place or state == "8bit"
    if name in INTERPRETERS or (state == "8bit" and in_place)
]
# All shapes in the default format and in place; one with a batch in all.
COMPARED = [
    (*case, shape)
    for case in CASES
    for shape in SHAPES
    if case[1:] == ("8bit", True) or shape == SHAPES[3]
]


@pytest.mark.parametrize(("name", "state", "in_place", "shape"), COMPARED, ids=str)
def test_kernel_equals_xla(
    name: str,
    state: str,
    in_place: bool,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = interpreted(name, monkeypatch)
    expect_equal_to_xla(backend, USUAL, shape, in_place, state=state)


@pytest.mark.parametrize("rule", [rule for rule in OPTIMIZERS if rule != USUAL])
@pytest.mark.parametrize("name", INTERPRETERS)
def test_kernels_of_every_rule_equal_xla(
    name: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = interpreted(name, monkeypatch)
    expect_equal_to_xla(backend, rule, SHAPES[0], in_place=True)


@pytest.mark.parametrize("shape", [(1, 8192), (8192, 1), (1, 40, 1)], ids=str)
@pytest.mark.parametrize("name", INTERPRETERS)
def test_leaves_with_axes_of_length_1(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as (1, 8192), each of whose blocks has one value."""
    backend = interpreted(name, monkeypatch)
    expect_equal_to_xla(backend, USUAL, shape, in_place=True)


def test_partial_tiles_and_several_grid_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "_TILE_VALUES", 1 << 12)
    monkeypatch.setattr(_memory, "_TILE_LANES", 128)
    backend = interpreted("tpu-interpreter", monkeypatch)
    leaves = []
    for shape in [(1000, 333), (531, 300), (5, 531, 140), (640, 5, 40)]:
        for name in (backend, "xla"):
            leaves.append(run(make(USUAL, backend=name), shape, steps=2))
        expect_equal_up_to_contraction(*leaves[-2:])


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("platform", ["cpu", *PLATFORMS])
def test_the_best_backend(platform: str, state: str) -> None:
    """Of the platform, where it is worth a kernel: XLA fuses other steps as well."""
    program = program_of(make(USUAL, state=state), jnp.zeros((96, 40)))
    chosen = choose(program, (jnp.float32,), platform)
    if not program.storage.quantized:
        assert chosen == ("xla", "not quantized")
    elif platform == "cpu":
        assert chosen == ("xla", "no kernel for cpu")
    else:
        assert chosen == (PLATFORMS[platform][0], "")


def test_of_several_kernels_the_first_that_takes_a_leaf(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PLATFORMS, "both", ("tpu", "triton"))
    for shape, expected in (((96, 40), "tpu"), ((8192,), "triton")):
        program = program_of(make(USUAL), jnp.zeros(shape))
        assert choose(program, (jnp.float32,), "both") == (expected, "")
    program = program_of(make(USUAL, block_size=24), jnp.zeros(8192))
    backend, why = choose(program, (jnp.float32,), "both")
    assert backend == "xla"
    assert "tpu: the TPU kernel takes leaves of rank 2" in why
    assert "triton: the Triton kernel takes blocks of a power of two" in why


def test_one_device_is_used_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(checks, "_given", set())
    tx, p = make(USUAL), jnp.zeros((96, 40))
    assert [row.backend for row in optim.explain(tx, p).rows] == ["triton"]
    assert "octavo_step" in str(jax.make_jaxpr(tx.step)(p, tx.init(p), p))


def test_several_devices_whose_use_is_not_known_are_left_to_xla(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel cannot be partitioned automatically: a warning says what to pass."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(checks, "_given", set())
    tx, p = make(USUAL), jnp.zeros((96, 40))
    (row,) = optim.explain(tx, p).rows  # no warning: it says so itself
    assert row.backend == "xla" and "tx = tx.bind(params)" in row.why
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = [str(jax.make_jaxpr(tx.step)(p, tx.init(p), p)) for _ in range(2)]
    assert not any("octavo_step" in step for step in steps)
    (warned,) = caught
    assert "8 devices" in str(warned.message)
    assert "Write tx = tx.bind(params)" in str(warned.message)
    # What is named is taken, and what no kernel would take anyway needs no warning.
    named = make(USUAL, backend="triton")
    assert "octavo_step" in str(jax.make_jaxpr(named.step)(p, named.init(p), p))
    monkeypatch.setattr(checks, "_given", set())
    dense = make(USUAL, state="32bit")
    jax.eval_shape(dense.step, p, dense.init(p), p)


# What no kernel of the platform takes, and why.
REFUSED: list[tuple[str, str, tuple[int, ...], dict[str, Any], str]] = [
    ("tpu", "tpu", (8192,), {}, "leaves of rank 2 or more"),
    (
        "gpu",
        "triton",
        (240, 64),
        {"block_size": 24},
        "blocks of a power of two, not of 12",
    ),
    ("tpu", "tpu", (16384, 100), {"block_size": 64}, "more memory than"),
    ("tpu", "tpu", (64, 40), {"layer_axes": 1}, "layers on sublanes or"),
    ("gpu", "triton", (64, 40), {"layer_axes": 1}, "layers inside the"),
]


@pytest.mark.parametrize(
    ("platform", "backend", "shape", "options", "why"),
    REFUSED,
    ids=[f"{row[1]}-{row[2]}" for row in REFUSED],
)
def test_leaves_that_no_kernel_takes(
    platform: str,
    backend: str,
    shape: tuple[int, ...],
    options: dict[str, Any],
    why: str,
) -> None:
    """XLA takes them; where a kernel is named, an error names the leaf and says why."""
    p = {"a": {"kernel": jnp.ones(shape)}}
    (row,) = optim.explain(make(USUAL, **options), p, platform=platform).rows
    assert row.backend == "xla" and why in row.why
    tx = make(USUAL, backend=backend, **options)
    message = f"^'a/kernel': backend='{backend}' .*{why}.* Leave backend out"
    for call in (tx.step, tx.update):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call, p, tx.init(p), p)
    with pytest.raises(ValueError, match=message):
        optim.explain(tx, p)


@pytest.mark.parametrize("name", ["tpu", "triton"])
def test_leaves_without_blocks_are_xlas_though_a_kernel_is_named(name: str) -> None:
    """Biases and other types of leaves: they need no kernel, and so no error."""
    p = {"bias": jnp.ones(8), "z": jnp.ones((64, 96), "complex64"), "one": jnp.ones(())}
    tx = RULES[USUAL].ours(0.01, backend=name)
    explained = {row.path: row for row in optim.explain(tx, p).rows}
    assert explained["z"].backend == "xla"
    assert "its kernel does not take complex64" in explained["z"].why
    with jax.numpy_dtype_promotion("standard"):
        jax.eval_shape(tx.step, p, tx.init(p), p)
