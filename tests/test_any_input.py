"""Whatever is given: the right numbers, or an error that says what to write instead.

`drawn` makes the problems up, and `exact` solves them in float64.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings

from octavo import optim
from octavo.optim.storage.tree import Leaves
from octavo.pallas_kernels import FORMATS as KERNEL_FORMATS
from octavo.pallas_kernels import Storage

from cases import FORMATS, RULES, FormatCase
from drawn import RATE, Problem, paths_of, problems
from exact import Expected, LeafCase, clip_factors, expected, real

# What an error says besides the name of what is wrong: what is allowed.
REMEDIES = ("must be", "known are", "the options are", "give", ", not ", "expected")
REMEDIES += ("is not an axis", "Leave", "Write", "write", "fit the parameters")
# Name of a format -> what the documentation promises of it.
PROMISES: dict[str, FormatCase] = {
    KERNEL_FORMATS[name](*kind).name: promise
    for name, kinds in FORMATS.items()
    for kind, promise in kinds.items()
}
# Each problem is a program of its own, and LLVM takes most of the time.
QUICKLY: Any = {"xla_backend_optimization_level": 0}
# Adagrad's moments start at 0.1, that of an imaginary part, too.
Z = jnp.asarray([0.5 + 0.25j, 1j], "complex64")
COMPLEX = Problem(
    "adagrad", Z, [Z, Z], {"learning_rate": RATE}, {"layer_axes": {}}, None
)


@pytest.mark.filterwarnings("ignore:min_shards=")  # leaves are as short as they can be
@settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[*HealthCheck],
)
@given(problems())
@example(COMPLEX)
def test_right_numbers_or_an_error_that_says_what_to_write(problem: Problem) -> None:
    try:
        run = two_steps(problem)
    except (ValueError, TypeError) as error:
        said = str(error)
        assert problem.wrong is not None, said
        assert problem.wrong in said and any(x in said for x in REMEDIES), said
        return
    # An axis that biases lack is none of theirs; where there is no leaf, none is wrong.
    harmless = problem.wrong in (None, "block_axis") or not paths_of(problem.params)
    assert harmless, f"{problem.wrong}={problem.options.get(problem.wrong or '')!r}"
    expect_types(run, problem)
    exact = exact_steps(problem)
    expect_near(run.params[1], from_the_start(run, [row[0] for row in exact]))
    if any(form.name != "float32" for r in run.records for form in r.formats):
        second = from_stored_moments(run, problem, [row[1] for row in exact])
    else:
        second = [row[1] for row in exact]
    expect_near(run.params[2], second)
    if problem.options.get("skip_nonfinite"):
        expect_nothing_of_a_bad_gradient(run, problem)


class Run(NamedTuple):
    """Two steps: what is there before, between and after them."""

    step: Any
    params: list[Any]
    states: list[Any]
    records: list[Storage]


def optimizer(problem: Problem, **options: Any) -> optim.Transformation:
    """Of a problem, with other options."""
    case = RULES[problem.rule]
    return case.ours(**{**case.kwargs, **problem.options, **options})


def two_steps(problem: Problem) -> Run:
    """With each of the gradients."""
    tx = optimizer(problem)
    run = Run(
        jax.jit(tx.step, compiler_options=QUICKLY),
        [problem.params],
        [tx.init(problem.params)],
        tx.optimizer.records(Leaves.of(problem.params)),
    )
    for g in problem.grads:
        p, state = run.step(g, run.states[-1], run.params[-1])
        run.params.append(p)
        run.states.append(state)
    return run


def expect_types(run: Run, problem: Problem) -> None:
    """Trees, shapes and types stay as they are, and everything is finite."""
    like = jax.tree.map(jnp.asarray, problem.params)
    for p, state in zip(run.params[1:], run.states[1:], strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(p, like)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, run.states[0])
        chex.assert_tree_all_finite((p, state))


def exact_steps(problem: Problem) -> list[list[Expected]]:
    """For each leaf, the parameter after each step."""
    paths = paths_of(problem.params)
    leaves, *grads = (
        [jnp.asarray(x) for x in jax.tree.leaves(tree)]
        for tree in (problem.params, *problem.grads)
    )
    said = problem.leaves
    named = [dict(zip(paths, g, strict=True)) for g in grads]
    factors = clip_factors(named, problem.options.get("grad_clip_norm"))
    limits = ("grad_clip_value", "max_unorm")
    given = {x: float(problem.options[x]) for x in limits if x in problem.options}
    decay = RULES[problem.rule].kwargs.get("weight_decay", 0.0)
    found = []
    for path, p, *own in zip(paths, leaves, *grads, strict=True):
        if not jnp.issubdtype(p.dtype, jnp.inexact):  # no step changes integers
            found.append([Expected(real(p), np.zeros(p.shape))] * len(own))
            continue
        rate = RATE * float(said.get("lr_scale", {}).get(path, 1.0))
        own_decay = float(said.get("weight_decay", {}).get(path, decay))
        layers = said["layer_axes"].get(path, ())
        leaf = LeafCase(p, own, rate, own_decay, layers, given)
        found.append(expected(problem.rule, leaf, factors))
    return found


def expect_near(got: Any, rows: list[Expected]) -> None:
    """Every value of every leaf."""
    for x, row in zip(jax.tree.leaves(got), rows, strict=True):
        off = np.abs(real(x) - row.p) - row.within
        assert (off <= 0).all(), (off.max(), real(x), row)


def from_the_start(run: Run, rows: list[Expected]) -> list[Expected]:
    """The first step: moments that start at zero are exact in every format.

    Adagrad's starts at 0.1, which not every format has.
    """
    found = []
    leaves = map(real, jax.tree.leaves(run.params[0]))
    for old, record, row in zip(leaves, run.records, rows, strict=True):
        worst = [PROMISES[s.format.name].worst for s in record.slots if s.initial]
        off = max(worst, default=0.0) * np.abs(row.p - old)
        found.append(Expected(row.p, row.within + off))
    return found


def from_stored_moments(
    run: Run, problem: Problem, within: list[Expected]
) -> list[Expected]:
    """The second step in 32 bits, which the first test holds against float64.

    From the moments that are stored, which are as near as the format promises.
    """
    wide = optimizer(problem, state="32bit")
    step, fresh = jax.jit(wide.step, compiler_options=QUICKLY), wide.init(run.params[0])
    _, exact = step(problem.grads[0], fresh, run.params[0])
    stored = optim.dequantize(run.states[1])
    slots = RULES[problem.rule].slots
    for k, record in enumerate(run.records):
        pairs = [
            [np.asarray(jax.tree.leaves(trees[slot.name])[k]) for slot in slots]
            for trees in (stored, exact.trees)
        ]
        expect_promised(record, *pairs)
    like = {name: exact.trees[name] for name in stored}
    moments = jax.tree.map(lambda x, like: x.astype(like.dtype), stored, like)
    start = exact._replace(**moments)
    if start.remainders is not None:
        start = start._replace(remainder=run.states[1].remainder)
    p, _ = step(problem.grads[1], start, run.params[1])
    found = []
    columns = map(jax.tree.leaves, (p, run.params[1], problem.grads[0]))
    for new, old, g, row in zip(*columns, within, strict=True):
        # Without a gradient, v is clamped up, and in a step to (1 - b2) less: no root
        # is taken of that, but of the number that it was clamped to. The furthest
        # decay is RMSprop's .9, and so its root .95 of it.
        moved = 0.06 * np.abs(real(new) - real(old))
        clamped = np.where(real(g) == 0, moved, 0.0)
        found.append(Expected(real(new), row.within + clamped))
    return found


def expect_promised(record: Storage, got: list[Any], exact: list[Any]) -> None:
    """Moments of a leaf, or their quotients, are as near as their formats promise."""
    for slot, x, y in zip(record.slots, got, exact, strict=True):
        if slot.reference is not None:
            x, y = (
                np.divide(m, root, out=np.zeros_like(m), where=root > 0)
                for m, root in (
                    (x, np.sqrt(got[slot.reference])),
                    (y, np.sqrt(exact[slot.reference])),
                )
            )
        promise, size = PROMISES[slot.format.name], np.abs(y)
        # Unbiased rounding goes to the further code, too. Arithmetic has its own share.
        worst = 2 * promise.worst * (1 + 2 * promise.worst)
        least = promise.range * largest(record, size) if slot.format.quantized else 0.0
        within = worst * np.maximum(size, least) + 2.0**-20 * size
        assert (np.abs(x - y) <= within).all(), (slot.format.name, x, y)


def largest(record: Storage, size: np.ndarray) -> np.ndarray:
    """Of each block, at each of its values."""
    axis, width = record.blocks.axis, record.blocks.size
    starts = np.arange(0, record.shape[axis], width)
    tops = np.maximum.reduceat(size, starts, axis=axis)
    return np.repeat(tops, width, axis=axis).take(range(record.shape[axis]), axis=axis)


def expect_nothing_of_a_bad_gradient(run: Run, problem: Problem) -> None:
    """With `skip_nonfinite`, all stays bit for bit."""
    moving = [r.steps for r in run.records]
    leaves, treedef = jax.tree.flatten(problem.grads[1])
    pairs = zip(leaves, moving, strict=True)
    spoiled = [jnp.full_like(g, np.nan) if moves else g for g, moves in pairs]
    bad = treedef.unflatten(spoiled)
    before = run.params[1], run.states[1]
    after = run.step(bad, before[1], before[0])
    assert int(after[1].extra["skipped"]) == any(moving)
    if not any(moving):
        return
    chex.assert_trees_all_equal(after[0], before[0])
    chex.assert_trees_all_equal(after[1].trees, before[1].trees)
