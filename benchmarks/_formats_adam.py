"""Rules on rounded moments beside exact ones: what `formats.py` measures."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from _formats_candidates import F32, Candidate
from jax import lax

from octavo.optim.adam import ADAM
from octavo.optim.lion import LION
from octavo.optim.momentum import momentum_rule
from octavo.pallas_kernels import (
    Blocks,
    Leaf,
    Program,
    Scalars,
    Storage,
    StoredSlot,
    rounding,
)
from octavo.pallas_kernels.arithmetic import QUICK, using
from octavo.pallas_kernels.step import tile_step

BLOCK = 32  # a block is a column
FRACTIONS = (1e-3, 1e-4, 1e-5, 1e-6)
_AFTER, _LATE = 50, 300  # steps after a visit
_LION = replace(LION, decay=None)
_SGD = momentum_rule(nesterov=False)  # what it is, is a scalar
Forms: TypeAlias = tuple[Candidate, ...]
Kind: TypeAlias = Literal["normal", "heavy", "constant"]


class World(NamedTuple):
    """Gradients and hyperparameters, which broadcast to elements.

    Args:
      sigma: scale of the gradients.
      b1: of each column.
      b2: of each column.
      period: an element has a gradient once in so many steps.
      phase: steps since the last one, at the start.
      mean: of the gradients, beside a standard deviation of 1.
    """

    sigma: jax.Array
    b1: jax.Array
    b2: jax.Array
    period: jax.Array
    phase: jax.Array
    mean: jax.Array


def world(sigma: jax.Array, b1: Any, b2: Any) -> World:
    """With a gradient in every step."""
    ones = jnp.ones((1, sigma.shape[1]))
    every = jnp.ones(sigma.shape, jnp.int32)
    return World(sigma, b1 * ones, b2 * ones, every, 0 * every, 0.0 * ones)


class State(NamedTuple):
    """Codes and scales of each moment."""

    codes: tuple[Any, ...]
    scales: tuple[Any, ...]


class _Numbers(NamedTuple):
    """Of Adam without bias correction, which is the same factor everywhere; of SGD."""

    b1: jax.Array
    b2: jax.Array
    weight: jax.Array
    correction: float = 1.0
    eps: float = 0.0
    rate: float = 1.0

    @property
    def momentum(self) -> jax.Array:
        """Of SGD."""
        return self.b1


class Squares(NamedTuple):
    """Sums over steps, for each element, of squares, of u and of |u|."""

    error: jax.Array
    rounded: jax.Array
    exact: jax.Array
    way: jax.Array
    exact_way: jax.Array
    path: jax.Array


class Visits(NamedTuple):
    """The way after a gradient, and sums of many such ways; for each element."""

    way: jax.Array
    exact_way: jax.Array
    rounded: jax.Array
    exact: jax.Array
    late: jax.Array
    exact_late: jax.Array
    late_steps: jax.Array
    error: jax.Array
    squares: jax.Array


def squares(s: Squares, age: jax.Array, u: jax.Array, rounded: jax.Array) -> Squares:
    """One more step."""
    del age
    new = (rounded - u) ** 2, rounded**2, u**2, rounded, u, jnp.abs(rounded)
    return Squares(*map(jnp.add, s, new))


def visits(s: Visits, age: jax.Array, u: jax.Array, rounded: jax.Array) -> Visits:
    """One more step."""
    way = jnp.where(age == 0, 0.0, s.way) + rounded
    exact_way = jnp.where(age == 0, 0.0, s.exact_way) + u
    done, late = jnp.float32(age == _AFTER), jnp.float32(age >= _LATE)
    return Visits(
        way,
        exact_way,
        s.rounded + done * jnp.sign(exact_way) * way,
        s.exact + done * jnp.abs(exact_way),
        s.late + late * jnp.abs(rounded),
        s.exact_late + late * jnp.abs(u),
        s.late_steps + late,
        s.error + (rounded - u) ** 2,
        s.squares + u**2,
    )


def _noise(key: jax.Array, shape: tuple[int, int]) -> tuple[list, list]:
    """Of each slot, for values and for blocks: as the library's backends have it."""
    quarter = (rounding.period(BLOCK), shape[1])
    position = jnp.arange(quarter[0] * quarter[1], dtype=jnp.int32).reshape(quarter)
    bits = rounding.hashed(key, position)
    noise, draws = rounding.noise, [rounding.Draw(slot) for slot in (0, 1)]
    parts = [[noise(bits, k, draw) for k in range(4)] for draw in draws]
    return [jnp.concatenate(p) for p in parts], [noise(bits[:1], 0, d) for d in draws]


def _storage(forms: Candidate, shape: tuple[int, int], dither: Any = None) -> Storage:
    """With scales that are longer by `dither`, where a candidate likes it."""
    slots = []
    for k, form in enumerate(x for x in forms[:2] if x is not None):
        dithered = getattr(form, "dithered", None)
        if dithered is not None and dither is not None:
            form = dithered(dither[k])
        reference = 1 if form.relative else None
        slots.append(
            StoredSlot("mn"[k], form, jnp.dtype(form.dtype), reference=reference)
        )
    return Storage(jnp.dtype("float32"), Blocks(shape, 0, BLOCK), tuple(slots))


def _step(
    forms: Candidate, state: State, g: jax.Array, where: World, noise: Any
) -> tuple[State, jax.Array]:
    """The library's own step, of which u is the update."""
    values, blocks = noise
    storage = _storage(forms, g.shape, blocks)
    rule = _LION if forms.signs else _SGD if forms.v is None else ADAM
    weight = jnp.ones_like(where.b1) if forms.v is None else 1 - where.b1
    new = tile_step(
        Program(rule, storage, in_place=False),
        Leaf(g, None, *state),
        Scalars(jnp.float32(-1.0), _Numbers(where.b1, where.b2, weight)),
        largest=lambda x: jnp.max(x, axis=0, keepdims=True),
        random=lambda draw: values[draw.slot],
    )
    return State(new.codes, new.scales), new.g


def started(forms: Forms, *moments: jax.Array) -> tuple[State, ...]:
    """States of the exact rule and of each candidate, with these moments."""

    def state(of: Candidate) -> State:
        storage = _storage(of, moments[0].shape)
        stored = [
            storage.encode(k, x, None if slot.reference is None else moments[1])
            for k, (x, slot) in enumerate(zip(moments, storage.slots, strict=False))
        ]
        return State(*zip(*stored, strict=True))

    return tuple(state(of) for of in (_exact(forms), *forms))


def _exact(forms: Forms) -> Candidate:
    return forms[0]._replace(m=F32, v=None if forms[0].v is None else F32)


def _gradients(kind: Kind, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Of standard size; heavy tails are Student's t of 3."""
    if kind == "constant":
        return jnp.ones(shape)
    if kind == "normal":
        return jax.random.normal(key, shape)
    normal = jax.random.normal(key, (4, *shape))
    return normal[0] * lax.rsqrt(jnp.mean(normal[1:] ** 2, axis=0))


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(
    candidates: Forms,
    kind: Kind,
    meter: Callable[..., Any],
    start: jax.Array | int,
    end: jax.Array | int,
    where: World,
    states: tuple[State, ...],
    seed: jax.Array,
) -> tuple[tuple[State, ...], tuple[Any, ...]]:
    """Steps from start to end of all candidates, and of an exact rule.

    All see the same gradients and random numbers.

    Args:
      candidates: which to run: Adams, SGDs or Lions.
      kind: of gradients.
      meter: what to sum up: `squares` or `visits`.
      start: number of the first step.
      end: and of the first one not to take.
      where: gradients and hyperparameters.
      states: of the exact rule, and of each candidate.
      seed: of the gradients.

    Returns:
      States, and sums of each candidate.
    """
    shape = where.sigma.shape

    def step(t: jax.Array, carry: tuple) -> tuple:
        old, sums = carry
        age = (t + where.phase) % where.period
        g = _gradients(kind, jax.random.fold_in(seed, t), shape) + where.mean
        g = where.sigma * g
        g = jnp.where(age == 0, g, 0.0)
        noise = _noise(rounding.step_key(0, jnp.int32(t)), shape)
        pairs = zip((_exact(candidates), *candidates), old, strict=True)
        new = [_step(forms, state, g, where, noise) for forms, state in pairs]
        states, (exact, *updates) = zip(*new, strict=True)
        pairs = zip(sums, updates, strict=True)
        return states, tuple(meter(s, age, exact, u) for s, u in pairs)

    of = Squares if meter is squares else Visits
    zeros = of(*[jnp.zeros(shape)] * len(of._fields))
    with using(QUICK):
        return lax.fori_loop(start, end, step, (states, (zeros,) * len(candidates)))


def fresh(where: World, forms: Forms) -> tuple[State, ...]:
    """Zeros."""
    return started(forms, *[jnp.zeros(where.sigma.shape)] * 2)


def ratio(part: jax.Array, whole: jax.Array) -> float:
    """Of sums of squares, over steps and elements, as rms."""
    return float(jnp.sqrt(part.sum() / whole.sum()))


def spread(columns: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Standard deviations of the gradients, before and after the drop."""
    sigma = jnp.exp(jax.random.normal(key, (BLOCK, columns)))
    fallen = jnp.arange(BLOCK)[:, None] % 2 == 0
    return sigma, jnp.where(fallen, 0.1, 1.0) * sigma


def small(columns: int) -> jax.Array:
    """Standard deviations that are fractions of the largest."""
    rows = [1.0] * 4 + [fraction for fraction in FRACTIONS for _ in range(7)]
    return jnp.asarray(rows)[:, None] * jnp.ones((1, columns))


def without_gradients(columns: int, betas: Any, forms: Forms, seed: int) -> tuple:
    """Blocks whose first row has a gradient of 1 in every step, the others none."""
    b1, b2 = (jnp.repeat(jnp.asarray(b), columns) for b in zip(*betas, strict=True))
    first = jnp.arange(BLOCK)[:, None] == 0
    size = jnp.exp(jax.random.normal(jax.random.key(seed), (BLOCK, b1.size))) / 2
    size = jnp.where(first, 1.0, size)
    where = world(first * jnp.ones_like(size), b1, b2)
    return where, started(forms, size, size**2)
