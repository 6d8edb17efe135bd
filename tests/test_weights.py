"""Parameters of 16 bits: how they are rounded, with what is kept of them, and without.

Against numpy: its float16, and ml_dtypes' bfloat16 behind it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octavo import optim
from octavo.pallas_kernels import WEIGHTS, Noise, has_16_bits, noise_bits
from octavo.pallas_kernels import weights as stored
from octavo.pallas_kernels.backends.xla import random_of_blocks
from octavo.pallas_kernels.layout import blocks_of
from octavo.pallas_kernels.rounding import Draw

TYPES = (jnp.bfloat16, jnp.float16)
ROUNDED = [name for name in WEIGHTS if name != "nearest"]
KEPT = [name for name, bits in WEIGHTS.items() if bits]


def every_value(dtype: Any) -> np.ndarray:
    """All finite ones."""
    x = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    return x[np.isfinite(x.astype(np.float32))]


def unit_of(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The distance of the type's values in the octave of x, in float64."""
    kind = jnp.finfo(dtype)
    least = np.floor(np.log2(float(kind.tiny)))
    octave = np.floor(np.log2(np.abs(x.astype(np.float64))))
    return 2.0 ** (np.maximum(octave, least) - kind.nmant)


def split(x: Any, dtype: Any, name: Any, noise: Any) -> stored.Stored:
    """As it is stored: remainders cast, and read again."""
    found = jax.jit(stored.split, static_argnums=(1, 2))(x, dtype, name, noise)
    kept = stored.remainder_dtype(name)
    if kept is None:
        return found
    return found._replace(remainder=found.remainder.astype(kept).astype(jnp.int32))


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_value_is_stored_as_itself(dtype: Any, name: Any) -> None:
    x = every_value(dtype)
    for noise in (0, 2 ** noise_bits(name) - 1):
        found = split(jnp.asarray(x, jnp.float32), dtype, name, np.int32(noise))
        same = np.asarray(found.p.astype(dtype)).view(np.uint16) == x.view(np.uint16)
        assert same.all()
        assert found.remainder is None or not np.asarray(found.remainder).any()


@pytest.mark.parametrize("dtype", TYPES)
def test_remainder16_holds_float32(dtype: Any) -> None:
    """Every bit of it; float16 down to 2**-17, and below to 2**-41."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    if dtype == jnp.float16:
        x = np.ldexp(np.frexp(x)[0], rng.integers(-40, 17, x.size))
    x = x[np.abs(x) <= float(jnp.finfo(dtype).max)]
    found = split(jnp.asarray(x), dtype, "remainder16", 0)
    back = jax.jit(lambda s: stored.full(s, dtype, "remainder16"))(found)
    exact = np.abs(x) >= (2.0**-17 if dtype == jnp.float16 else 0.0)
    assert exact.mean() > 0.5
    np.testing.assert_array_equal(
        np.asarray(back)[exact].view(np.uint32), x[exact].view(np.uint32)
    )
    assert np.abs(np.asarray(back) - x)[~exact].max(initial=0.0) <= 2.0**-41
    # And the parameter is the nearest value, but for ties, and what 2**-41 makes one.
    p, nearest = np.asarray(found.p), x.astype(jnp.dtype(dtype)).astype(np.float32)
    tied = np.abs(np.abs(x.astype(np.float64) - p) / unit_of(x, dtype) - 0.5) < 2.0**-17
    np.testing.assert_array_equal(p[~tied], nearest[~tied])


@pytest.mark.parametrize("dtype", TYPES)
def test_remainder8_holds_a_256th_of_a_unit(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=2**18) * 2.0 ** rng.integers(-20, 12, 2**18)).astype("f4")
    x = x[np.abs(x) < 6e4]
    for noise, least, most in ((0, -1.0, 0.0), (255, 0.0, 1.0), (128, -0.5, 0.5)):
        found = split(jnp.asarray(x), dtype, "remainder8", np.int32(noise))
        back = jax.jit(lambda s: stored.full(s, dtype, "remainder8"))(found)
        off = (np.abs(np.asarray(back)) - np.abs(x)) / (unit_of(x, dtype) / 256)
        # float16 below 2**-17 has 2**-40 for its smallest part, half of it a rounding.
        rounding = 2.0**-9 if dtype == jnp.float16 else 0.0
        assert least - rounding <= off.min() and off.max() <= most + rounding


def noise_of_a_leaf(name: Any) -> np.ndarray:
    """As a step takes it: of a million values."""
    blocks = blocks_of((1024, 1024))
    noise = Noise(jnp.int32(12345), np.int32(678), jnp.int32(0))
    draw = Draw(None, noise_bits(name))
    drawn = jax.jit(lambda: random_of_blocks(noise, blocks)(draw))()
    return np.asarray(drawn).reshape(-1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_is_unbiased_in_every_octave(dtype: Any, sign: int) -> None:
    """A million roundings each of values within an octave, at its ends and beyond.

    To 3 standard errors. In all octaves of a type the noise is the same, and so has to
    be what becomes of it.
    """
    noise = jnp.asarray(noise_of_a_leaf("stochastic"))
    kind = jnp.finfo(dtype)
    # Subnormal ones of float16, too. The largest value of the last is not rounded up.
    exponents = np.arange(-16 if dtype == jnp.float16 else kind.minexp, kind.maxexp - 1)
    unit = unit_of(2.0**exponents, dtype)

    @jax.jit
    def shares(values: jax.Array) -> jax.Array:
        """Of roundings that go up, for each value."""

        def of(value: jax.Array) -> jax.Array:
            p = stored.split(value, dtype, "stochastic", noise).p
            return jnp.mean(jnp.abs(p) > jnp.abs(value), dtype=jnp.float32)

        return jax.lax.map(of, values)

    # Parts of a unit above the first value of the octave, one within, and the last.
    for mantissa in (0, 37, 2**kind.nmant - 1):
        for part in (0.3, 0.0125, 0.9):
            low = np.floor(2.0**exponents / unit + mantissa) * unit
            x = (sign * (low + part * unit)).astype(np.float32)
            wanted = (np.abs(x.astype(np.float64)) - low) / unit
            error = 3 * np.sqrt(wanted * (1 - wanted) / noise.size)
            assert (np.abs(np.asarray(shares(x)) - wanted) <= error).all()


@pytest.mark.parametrize("name", ["stochastic", "remainder8"])
def test_noise_is_uniform_and_not_that_of_the_slots(name: Any) -> None:
    noise = noise_of_a_leaf(name)
    width = noise_bits(name)
    assert noise.min() == 0 and noise.max() == 2**width - 1
    counts = np.bincount(noise >> (width - 8), minlength=256)
    # Chi-squared with 255 degrees of freedom: 4 standard deviations.
    expected = noise.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 4 * np.sqrt(510)
    blocks = blocks_of((1024, 1024))
    given = Noise(jnp.int32(12345), np.int32(678), jnp.int32(0))
    for slot in (0, 1):
        of_slot = jax.jit(
            lambda slot=slot: random_of_blocks(given, blocks)(Draw(slot))
        )()
        both = np.corrcoef(np.asarray(of_slot).reshape(-1), noise)[0, 1]
        assert abs(both) < 0.05


def steps(tx: Any, params: Any, grads: Any, count: int) -> Any:
    """After steps with the same gradient."""

    def step(carry: Any, _: Any) -> Any:
        return tx.step(grads, carry[1], carry[0]), None

    start = params, tx.init(params)
    return jax.jit(lambda s: jax.lax.scan(step, s, None, length=count)[0])(start)


@pytest.mark.parametrize("dtype", TYPES)
def test_ten_thousand_small_steps_go_as_far_as_those_of_float32(dtype: Any) -> None:
    """From 1.0 with a learning rate of 1e-4: all the way to 0."""
    ones = jnp.ones((32, 64))
    wide, _ = steps(optim.adam(1e-4, state="32bit"), ones, ones, 10_000)
    assert abs(float(wide.mean())) < 1e-3
    for name in WEIGHTS:
        tx = optim.adam(1e-4, state="32bit", weights=name)
        p, state = steps(tx, ones.astype(dtype), ones.astype(dtype), 10_000)
        p = optim.masters(state, p) if name in KEPT else p
        apart = abs(float(p.astype(jnp.float32).mean() - wide.mean()))
        if name == "nearest":
            assert apart == pytest.approx(1.0, abs=1e-3)  # it has not moved
        else:
            assert apart < 0.01


LANDING = [*((name, jnp.bfloat16) for name in ROUNDED), ("remainder8", jnp.float16)]


@pytest.mark.parametrize(("name", "dtype"), LANDING)
def test_updates_land_where_steps_do(name: Any, dtype: Any) -> None:
    """Where a step at most doubles or halves; the states are equal everywhere."""
    rng = np.random.default_rng(0)
    tx = optim.adamw(1e-2, weights=name, min_quantized_size=0)
    for kind in (dtype, jnp.float32):  # of gradients
        p = jnp.asarray(rng.normal(size=(96, 40)), dtype)
        state = tx.init(p)
        step, update = jax.jit(tx.step), jax.jit(tx.update)
        for t in range(4):
            g = jnp.asarray(rng.normal(size=(96, 40)) * 10.0**-t, kind)
            updates, other = update(g, state, p)
            assert updates.dtype == dtype
            new, state = step(g, state, p)
            jax.tree.map(np.testing.assert_array_equal, state.trees, other.trees)
            landed = np.asarray(optax.apply_updates(p, updates))
            ratio = np.asarray(new, np.float32) / np.asarray(p, np.float32)
            near = (ratio >= 0.5) & (ratio <= 2.0)
            assert near.mean() > 0.95
            np.testing.assert_array_equal(landed[near], np.asarray(new)[near])
            p = new


@pytest.mark.parametrize("sign", [1, -1])
def test_bf16_values_within_a_factor_of_two_have_a_difference_that_lands(
    sign: int,
) -> None:
    """All pairs, but for differences that are denormal: devices take them for 0."""
    first = np.arange(0x0080, 0x7F80, dtype=np.int32)  # of one sign, normal
    apply = jax.jit(optax.apply_updates)
    pairs = 0
    for gap in range(-128, 129):
        other = np.clip(first + gap, 0x0080, 0x7F7F)
        p, new = (
            sign * x.astype(np.uint16).view(jnp.bfloat16).astype(np.float32)
            for x in (first, other)
        )
        difference = new - p
        chosen = (new / p >= 0.5) & (new / p <= 2) & (other == first + gap)
        chosen &= (np.abs(difference) >= 2.0**-126) | (gap == 0)
        old, new, update = (jnp.asarray(x, jnp.bfloat16) for x in (p, new, difference))
        landed = np.asarray(apply(old, update))
        np.testing.assert_array_equal(landed[chosen], np.asarray(new)[chosen])
        pairs += int(chosen.sum())
    assert pairs > 6_000_000


def test_types_that_have_16_bits() -> None:
    assert [has_16_bits(jnp.dtype(t)) for t in ("bfloat16", "float16")] == [True, True]
    assert not has_16_bits(jnp.dtype("int16"))
    assert not has_16_bits(jnp.dtype("float32"))
