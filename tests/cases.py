"""The table from which rules, formats, backends and benchmarks are tested.

A new optimizer is a row of `RULES`, a new format a row of `FORMATS`: every test and
the benchmark then cover it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from octavo import optim
from octavo.pallas_kernels import Slot

from formulas import (
    adagrad_float64,
    adagrad_of_optax,
    adamax_float64,
    adamw_float64,
    ademamix_float64,
    amsgrad_float64,
    amsgrad_of_optax,
    lamb_float64,
    lars_float64,
    lion_float64,
    nadam_float64,
    rmsprop_float64,
    sgd_float64,
    sgd_of_optax,
)


class RuleCase(NamedTuple):
    """An optimizer, the optax one that it equals in 32 bits, and its formula.

    Attributes:
      ours: makes it.
      optax: makes the other.
      kwargs: for both, and for the formula.
      numpy: `(p, grads, lr, **kwargs)` to the last p, in float64.
      kernels: passes over a leaf in one step; 2 where a ratio is measured first.
      pure: whether the moments depend on gradients alone, not on parameters.
      max_unorm: whether it takes the option of that name.
    """

    ours: Callable[..., optim.Transformation]
    optax: Callable[..., optax.GradientTransformation]
    kwargs: dict[str, Any]
    numpy: Callable[..., Any]
    kernels: int = 1
    pure: bool = True
    max_unorm: bool = True

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The moments that it keeps."""
        return self.ours(1.0, **self.kwargs).optimizer.rule.slots


RULES: dict[str, RuleCase] = {
    "adam": RuleCase(optim.adam, optax.adam, {}, adamw_float64),
    "adam-b2": RuleCase(optim.adam, optax.adam, {"b1": 0.8, "b2": 0.95}, adamw_float64),
    "nadam": RuleCase(optim.adam, optax.adam, {"nesterov": True}, nadam_float64),
    "amsgrad": RuleCase(
        optim.adam, amsgrad_of_optax, {"amsgrad": True}, amsgrad_float64
    ),
    "adamw": RuleCase(
        optim.adamw, optax.adamw, {"weight_decay": 0.1, "eps": 1e-6}, adamw_float64
    ),
    "adamax": RuleCase(optim.adamax, optax.adamax, {}, adamax_float64),
    "ademamix": RuleCase(
        optim.ademamix, optax.contrib.ademamix, {"weight_decay": 0.1}, ademamix_float64
    ),
    "lion": RuleCase(optim.lion, optax.lion, {"weight_decay": 0.1}, lion_float64),
    "rmsprop": RuleCase(optim.rmsprop, optax.rmsprop, {}, rmsprop_float64),
    "rmsprop-all": RuleCase(
        optim.rmsprop,
        optax.rmsprop,
        {"centered": True, "momentum": 0.9, "nesterov": True},
        rmsprop_float64,
        max_unorm=False,
    ),
    "adagrad": RuleCase(
        optim.adagrad,
        adagrad_of_optax,
        {"weight_decay": 0.1},
        adagrad_float64,
        pure=False,
    ),
    "lamb": RuleCase(
        optim.lamb, optax.lamb, {"weight_decay": 0.1}, lamb_float64, kernels=2
    ),
    "lars": RuleCase(
        optim.lars,
        optax.lars,
        {"weight_decay": 0.1, "trust_coefficient": 0.5},
        lars_float64,
        kernels=2,
        pure=False,
        max_unorm=False,
    ),
    "sgd": RuleCase(
        optim.sgd,
        sgd_of_optax,
        {"weight_decay": 0.1, "momentum": 0.9},
        sgd_float64,
        pure=False,
    ),
    "descent": RuleCase(
        optim.sgd, sgd_of_optax, {"weight_decay": 0.1}, sgd_float64, pure=False
    ),
}
# For tests that are slow: one row of each optimizer, and those that have a ratio.
OPTIMIZERS: list[str] = [
    name
    for name, case in RULES.items()
    if name == next(first for first, x in RULES.items() if x.ours is case.ours)
]
ADAPTING: list[str] = [name for name in OPTIMIZERS if RULES[name].kernels > 1]
# For those that are slower: with one, two and three slots, with one pass and two.
KINDS: list[str] = ["adamw", "ademamix", "sgd", *ADAPTING]


class FormatCase(NamedTuple):
    """What the documentation promises of a slot's format.

    Of what is stored: for formats that are relative to another slot, of the quotient.

    Attributes:
      worst: largest relative error of a value within the range, rounded to nearest.
      range: smallest magnitude within that error, relative to the block's largest.
      smallest: the smallest magnitude that has a code, likewise.
      levels: (code, value relative to the largest, which is 2) pairs, computed by hand.
    """

    worst: float
    range: float
    smallest: float
    levels: dict[int, float]


# What a slot is, as the names in FORMATS of the library take it: is it signed, and is
# it relative to another?
Kind: TypeAlias = tuple[bool, bool]
RELATIVE: Kind = (True, True)
SIGNED: Kind = (True, False)
UNSIGNED: Kind = (False, False)


def _alike(signed: FormatCase, unsigned: FormatCase) -> dict[Kind, FormatCase]:
    """Of a name whose signed slots are stored alike, relative or not."""
    return {RELATIVE: signed, SIGNED: signed, UNSIGNED: unsigned}


_MULAW16 = 1 - 2.0**-12 - 2.0**-16  # of the largest code, less that of zero

# ratio8: 127 equal steps; the worst midpoint above a tenth is 13.5 steps.
_RATIO8 = FormatCase(1 / 27, 0.1, 1 / 127, {127: 1.0, -127: -1.0, 64: 64 / 127, 0: 0.0})
# mulaw8: 32 equal steps in each octave of y, which is 1 at zero and 15.75 at the
# largest. The range begins at y = 2, where a value is 1 of 14.75 parts. Steps are 1/16
# there, and the first midpoint is at 33/32.
_MULAW8 = FormatCase(
    1 / 33,
    1 / 14.75,
    1 / 472,
    {127: 1.0, -127: -1.0, 1: 1 / 472, 32: 1 / 14.75, -64: -3 / 14.75, 0: 0.0},
)

# name -> kind of slot -> promise
FORMATS: dict[str, dict[Kind, FormatCase]] = {
    "32bit": _alike(*[FormatCase(0.0, 1e-30, 0.0, {})] * 2),
    "bf16": _alike(*[FormatCase(2.0**-8, 1e-30, 0.0, {})] * 2),
    # mulaw16: 2,048 equal steps in each octave of y; half of one is 2**-12 of the
    # lowest y in it, 2**-16 more than its value: in the range, the worst is of 2**-7.
    "16bit": _alike(
        FormatCase(
            2.0**-12 / (1 - 2.0**-9),
            2.0**-8,
            2.0**-27 / _MULAW16,
            {
                32767: 1.0,
                -32767: -1.0,
                1: 2.0**-27 / _MULAW16,
                2048: 2.0**-16 / _MULAW16,
                -4096: -3 * 2.0**-16 / _MULAW16,
                0: 0.0,
            },
        ),
        FormatCase(2.0**-8, 1e-30, 0.0, {}),
    ),
    # bits8: 264 equal steps of y, which is half of the largest at 2**-8. There a step
    # is 1/132 of it, and v moves by up to 15 times as much, where the last of the eight
    # octaves begins that y has in one of its own: 15/264 to the nearest, and a little
    # less with the scales that there are, eighths of an octave.
    "8bit": {
        RELATIVE: _RATIO8,
        SIGNED: _MULAW8,
        UNSIGNED: FormatCase(
            0.0554,
            2.0**-8,
            19 / 11 * 2.0**-40,
            {127: 1.0, -5: 2.0**-8, -71: 2.0**-16, -128: 19 / 11 * 2.0**-40},
        ),
    },
    "dynamic8": _alike(
        FormatCase(
            0.061645, 0.1, 5.5e-7, {-128: 1.0, -127: -0.99296875, 64: 0.10703125}
        ),
        FormatCase(
            0.032847, 0.1, 3.25e-7, {-1: 1.0, -2: 0.996484375, 127: 0.103515625}
        ),
    ),
}

# A tail of half a block, a block that is the axis, blocks on every kind of axis.
SHAPES: list[tuple[int, ...]] = [
    (96, 40),
    (80, 128),
    (1000, 9),
    (3, 64, 40),
    (40, 3, 64),
]

# Leaves of real models, for the compilers.
REAL_SHAPES: list[tuple[int, ...]] = [
    (4096, 4096),
    (50257, 768),
    (12, 64, 768),
    (768, 12, 64),
    (3, 3, 64, 128),
    (24, 1024, 4096),
    (1000, 333),
]


def params_and_grads(
    shape: tuple[int, ...], steps: int = 1, dtype: Any = jnp.float32, seed: int = 0
) -> tuple[jax.Array, list[jax.Array]]:
    """A leaf, and gradients whose scale differs from element to element."""
    rng = np.random.default_rng(seed)
    p = jnp.asarray(rng.normal(size=shape), dtype)
    spread = np.exp(rng.normal(size=shape))
    grads = [jnp.asarray(spread * rng.normal(size=shape), dtype) for _ in range(steps)]
    return p, grads


def trees(shapes: Any, steps: int) -> tuple[Any, list[Any]]:
    """Parameters of these shapes, and gradients of some steps."""

    def is_shape(x: Any) -> bool:
        return isinstance(x, tuple)

    made = jax.tree.map(lambda s: params_and_grads(s, steps), shapes, is_leaf=is_shape)
    params = jax.tree.map(lambda x: x[0], made, is_leaf=is_shape)
    grads = [
        jax.tree.map(lambda x, t=t: x[1][t], made, is_leaf=is_shape)
        for t in range(steps)
    ]
    return params, grads
