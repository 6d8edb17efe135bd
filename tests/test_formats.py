"""Formats keep what `docs/formats.md` promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim
from octavo.pallas_kernels import FORMATS as KERNEL_FORMATS
from octavo.pallas_kernels import Format, numbered
from octavo.pallas_kernels.formats import Bits8, Linear8, Mixed8, MuLaw, widened
from octavo.pallas_kernels.rounding import NEAREST, NOISE_BITS

from cases import FORMATS, RELATIVE, SIGNED, UNSIGNED, FormatCase

TINY = float(np.finfo(np.float32).tiny)
UNIT = 1 << NOISE_BITS  # noise that is one code
_WORDS = {SIGNED: "signed", RELATIVE: "relative", UNSIGNED: "unsigned"}
LEAST = 2.0**-100  # scale of all formats of signed slots but dynamic8
# Of those by mu-law: steps in each octave of y, and y of the largest; 1 is zero's.
MULAWS: list[MuLaw] = [MuLaw(8), MuLaw(16), Mixed8()]
STEPS = dict(zip(MULAWS, (32, 2048, 32), strict=True))
TOPS = dict(zip(MULAWS, (15.75, 2.0**16 - 2.0**4, 15.75), strict=True))
# Each format once, with its promise, and whether its values may be negative.
CASES: dict[str, tuple[Format, FormatCase, bool]] = {
    f"{name} {_WORDS[kind]}": (KERNEL_FORMATS[name](*kind), promise, kind[0])
    for name, kinds in FORMATS.items()
    for kind, promise in kinds.items()
    if kind != RELATIVE or KERNEL_FORMATS[name](*kind).relative
} | {"mixed8": (Mixed8(), FORMATS["8bit"][SIGNED], True)}
QUANTIZED = [label for label, (form, _, _) in CASES.items() if form.quantized]

all_formats = pytest.mark.parametrize("label", CASES)
quantized = pytest.mark.parametrize("label", QUANTIZED)
linear = pytest.mark.parametrize("relative", [True, False])
mulaw = pytest.mark.parametrize(
    "fmt", MULAWS, ids=lambda fmt: f"{type(fmt).__name__}{fmt.width}"
)


def encoded(fmt: Format, x: Any, noise: Any = NEAREST) -> tuple[jax.Array, jax.Array]:
    """Codes as they are stored, and the scales of blocks along the first axis."""
    x = jnp.asarray(x, jnp.float32)
    scale = fmt.scale(jnp.max(fmt.magnitude(x), axis=0, keepdims=True))
    return fmt.encode(x, scale, noise).astype(fmt.dtype), scale


def scale_of(fmt: Format, largest: float) -> jax.Array:
    """Of one block."""
    return fmt.scale(fmt.magnitude(jnp.full((1, 1), largest)))


def decoded(fmt: Format, codes: Any, scale: Any) -> np.ndarray:
    """What is stored, read again: the scale is bf16."""
    stored = jnp.asarray(scale).astype(jnp.bfloat16).astype(jnp.float32)
    return np.asarray(fmt.decode(widened(jnp.asarray(codes)), stored), np.float64)


def round_trip(fmt: Format, x: np.ndarray, noise: Any = NEAREST) -> np.ndarray:
    """Store and load a block."""
    return decoded(fmt, *encoded(fmt, x, noise))


def unit(fmt: Format) -> float:
    """What rounding is exact to, in codes: one of the noises that it takes."""
    return 2.0**-12 if fmt == MuLaw(16) else 1 / UNIT


def code_of(fmt: MuLaw, size: np.ndarray) -> np.ndarray:
    """Codes of mulaw, and parts of one, for magnitudes relative to the largest."""
    mantissa, exponent = np.frexp(1 + size * (TOPS[fmt] - 1))
    return STEPS[fmt] * (exponent - 1 + 2 * mantissa - 1)


def size_of(fmt: MuLaw, code: np.ndarray) -> np.ndarray:
    """The inverse."""
    octave, part = np.divmod(code, STEPS[fmt])
    return (2.0**octave * (1 + part / STEPS[fmt]) - 1) / (TOPS[fmt] - 1)


def curve(v: np.ndarray) -> np.ndarray:
    """y(v) of bits8, in float64: eight octaves of v are one of y, each linear."""
    mantissa, exponent = np.frexp(np.maximum(v, TINY))
    whole, octave = np.divmod(exponent + 126, 8)
    y = 2.0 ** (whole - 63) * (1 + (octave + 2 * mantissa - 1) / 8)
    # Below its smallest normal number float32 goes on linearly.
    return np.where(v < TINY, 2.0**-63 * (1 + v / TINY / 8), y)


def inverse_curve(y: np.ndarray) -> np.ndarray:
    """v of y(v)."""
    mantissa, exponent = np.frexp(y)
    octave, part = np.divmod((2 * mantissa - 1) * 8, 1)
    return 2.0 ** (8 * (exponent + 62) + octave - 127) * (1 + part)


# --------------------------------------------------------------------- what all promise


@all_formats
def test_worst_relative_error_is_the_documented_one(label: str) -> None:
    fmt, case, signed = CASES[label]
    # Of bits8 it depends on how the largest lies on its curve.
    mantissas = inverse_curve(2.0**-47 * (1 + np.arange(128) / 128))
    tops = mantissas if isinstance(fmt, Bits8) else np.ones(1)
    x = np.geomspace(max(case.range, 1e-6), 1.0, 2_000_001 // len(tops))[:, None] * tops
    x = np.float32(np.concatenate([x, -x]) if signed else x)
    error = np.abs(round_trip(fmt, x) - x) / np.abs(x)
    assert error.max() <= case.worst * (1 + 1e-3)
    assert error.max() >= case.worst * 0.98, "the documentation is too pessimistic"


@all_formats
def test_zeros_are_exact_and_a_state_of_zeros_is_fresh(label: str) -> None:
    fmt, _, _ = CASES[label]
    np.testing.assert_array_equal(round_trip(fmt, np.zeros(32)), 0.0)
    for start in (jnp.zeros, jnp.ones):  # whatever the codes are, if the scale is zero
        codes = start((32, 1), fmt.dtype)
        if fmt.quantized or start is jnp.zeros:
            np.testing.assert_array_equal(decoded(fmt, codes, jnp.zeros((1, 1))), 0.0)


@all_formats
def test_nothing_nonzero_of_a_second_moment_is_stored_as_zero(label: str) -> None:
    fmt, _, signed = CASES[label]
    if signed:
        return  # of first moments it may: steps become too small, not too large
    x = np.concatenate([[1.0], np.geomspace(TINY, 1.0, 10_000)])
    assert (round_trip(fmt, x) > 0).all()


@quantized
def test_below_the_range_values_flush_or_are_clamped_up(label: str) -> None:
    fmt, case, signed = CASES[label]
    x = 2 * case.smallest * np.asarray([1 / case.smallest, 1.0, 0.25, 1e-6])
    stored = np.asarray([1, 0, 0] if signed else [1, 1, 1]) * 2 * case.smallest
    np.testing.assert_allclose(round_trip(fmt, x)[1:], stored, rtol=2e-6)


@all_formats
@pytest.mark.parametrize("largest", [TINY * 4, 1e-30, 1e-8, 1.0, 1e8, 1e30, 8e37])
def test_any_magnitude_keeps_its_precision(label: str, largest: float) -> None:
    fmt, case, _ = CASES[label]
    largest = max(largest, LEAST) if isinstance(fmt, Linear8 | MuLaw) else largest
    x = np.float32(largest) * np.asarray([1.0, 0.75, 0.5, 0.3], np.float32)
    np.testing.assert_allclose(round_trip(fmt, x), x, rtol=case.worst + 1e-6)


@all_formats
def test_denormals_do_no_harm(label: str) -> None:
    fmt, _, _ = CASES[label]
    got = round_trip(fmt, np.full(32, 1e-42, np.float32))
    assert np.isfinite(got).all() and (got <= 2e-42).all() and (got >= 0).all()


@quantized
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_bad_value_makes_the_scale_infinite(label: str, bad: float) -> None:
    """Of quotients that of the squares says it: they are never finite by themselves."""
    fmt, _, _ = CASES[label]
    x = np.ones((8, 2), np.float32)
    x[3, 0] = bad
    _, scale = encoded(fmt, x)
    assert fmt.relative or np.isinf(scale[0, 0])
    assert np.isfinite(scale[0, 1])


def test_every_format_has_a_number_of_its_own() -> None:
    """Which states and checkpoints hold: the same for ever."""
    formats = {form for form, _, _ in CASES.values()} - {Mixed8()}
    mixed, plain = Mixed8(), MuLaw(8)  # the same codes, which only rounding tells apart
    assert (mixed.name, mixed.number) == (plain.name, plain.number)
    assert len({form.number for form in formats}) == len(formats)
    assert all(numbered(form.number) == form for form in formats)
    assert numbered(2) == KERNEL_FORMATS["bf16"](*SIGNED), "once to the nearest"
    assert numbered(10) == Linear8(), "once momentum's"


def test_slow_slots_have_16_bits_where_8_are_asked_for() -> None:
    state = optim.ademamix(1e-3).init({"w": jnp.zeros((64, 128))})
    assert [state.codes(name).leaves[0].dtype.name for name in state.slots] == [
        "int8",
        "int16",
        "int8",
    ]


# -------------------------------------------------------------------- every single code


def dynamic_map(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """bitsandbytes' construction: cells of decades, sorted, with 0 and 1."""
    values = [0.0, 1.0]
    for e in range(7):
        borders = np.linspace(0.1, 1.0, (2**e if signed else 2 ** (e + 1)) + 1)
        centres = (borders[:-1] + borders[1:]) / 2 * 10.0 ** (e - 6)
        values += [*centres, *(-centres if signed else [])]
    index = np.arange(256) - (127 if signed else 0)
    return np.where(index > 127, index - 256, index), np.sort(values)


LEVELS, _EQUAL = np.arange(9, 265), np.arange(-127, 128)
_WIDE = np.arange(-32767, 32768)


def _mulaw_book(fmt: MuLaw, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return codes, np.sign(codes) * size_of(fmt, np.abs(codes))


# Codes and their values beside a largest of 1 (bits8: of 2), ascending, in float64.
BOOKS: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "8bit relative": (_EQUAL, _EQUAL / 127),
    "8bit signed": _mulaw_book(MuLaw(8), _EQUAL),
    "8bit unsigned": (LEVELS - 137, inverse_curve(2.0**-47 * LEVELS / 264)),
    "16bit signed": _mulaw_book(MuLaw(16), _WIDE),
    "mixed8": _mulaw_book(MuLaw(8), _EQUAL),
    "dynamic8 signed": dynamic_map(True),
    "dynamic8 unsigned": dynamic_map(False),
}


@quantized
def test_every_code_has_its_value(label: str) -> None:
    (fmt, case, _), (codes, values) = CASES[label], BOOKS[label]
    assert len(codes) == len(values) >= 255
    for code, value in case.levels.items():  # those computed by hand
        got = decoded(fmt, np.full((1, 1), code, fmt.dtype), scale_of(fmt, 2.0))
        np.testing.assert_allclose(got, 2 * value, rtol=2e-6)
    got = decoded(fmt, codes.astype(fmt.dtype)[:, None], scale_of(fmt, values[-1]))
    # Two roundings of y, whose slope is at most 15.
    rtol = 15 * 2.0**-23 if label == "8bit unsigned" else 4e-7
    np.testing.assert_allclose(got[:, 0], values, rtol=rtol, atol=0)


@quantized
def test_every_border_is_halfway_between_two_codes(label: str) -> None:
    """Halfway in y for bits8."""
    codes, values = BOOKS[label]
    fmt, _, signed = CASES[label]
    if not signed:  # nothing else is stored as zero
        codes, values = codes[values > 0], values[values > 0]
    of_codes = curve(values) if isinstance(fmt, Bits8) else values
    border = (of_codes[1:] + of_codes[:-1]) / 2
    # float32; and 2 units below the top, and 1 of float32, where noise is added.
    near = np.abs(border) * 1e-6 + fmt.unbiased * np.diff(of_codes) * 3 * unit(fmt)
    x = np.concatenate([border - near, border + near, of_codes])
    x = inverse_curve(x) if isinstance(fmt, Bits8) else x
    got, _ = encoded(fmt, x[:, None])
    expected = np.concatenate([codes[:-1], codes[1:], codes])
    np.testing.assert_array_equal(got[:, 0], expected)


@quantized
def test_encoding_again_changes_nothing(label: str) -> None:
    """All codes, with every mantissa of a scale, where the largest has the top code."""
    fmt = CASES[label][0]
    codes = BOOKS[label][0].astype(fmt.dtype)
    one = scale_of(fmt, BOOKS[label][1][-1])
    # bits8's scale is an eighth root: 2**-4 stands for 2**-32. Its mantissa has 3 bits.
    first = 16 if isinstance(fmt, Bits8) else 1
    mantissas = 1 + jnp.arange(128.0)[None] // first * first / 128
    for octave in (1.0, 2.0**-1, 2.0**-4, 2.0**5):
        scales = one * octave * mantissas
        wide = np.broadcast_to(codes[:, None], (len(codes), 128))
        again, new_scales = encoded(fmt, decoded(fmt, wide, scales))
        np.testing.assert_array_equal(new_scales, scales)
        np.testing.assert_array_equal(again, wide)


# ---------------------------------------------------------------------- rounding, range


def blocks(least: float, most: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """3 million values in blocks of any size, and noise with many extremes."""
    rng = np.random.default_rng(seed)
    shape = (32, 93_750)
    low, high = np.asarray([least, most], np.float32).view(np.int32)
    largest = rng.integers(low, high, shape[1], endpoint=True, dtype=np.int32)
    # Log-uniform below the largest; some are as large, or zero.
    spread = 2.0 ** (-rng.uniform(0, 70, shape) * rng.integers(0, 2, shape))
    x = (largest.view(np.float32) * spread).astype(np.float32)
    x[0] = largest.view(np.float32)
    x[1, ::3] = 0.0
    noise = rng.integers(0, UNIT, shape, dtype=np.int32)
    ends = rng.choice(np.asarray([0, UNIT - 1], np.int32), shape)
    return x, np.where(rng.random(shape) < 0.3, ends, noise)


def check_codes(
    codes: Any,
    levels: np.ndarray,
    noise: np.ndarray,
    ends: tuple[int, int],
    where: np.ndarray,
    exact: float = 2.0,
) -> None:
    """Levels in units of noise, `exact` to so many, rounded by the noise; no wrap."""
    got = np.asarray(codes, np.int64)
    least, most = ((levels + d + noise) // UNIT for d in (-exact, exact))
    fits = (got >= np.maximum(least, ends[0])) & (got <= np.minimum(most, ends[1]))
    assert fits[np.broadcast_to(where, got.shape)].all()


def test_no_code_of_bits8_wraps_around() -> None:
    """From denormal numbers, whose levels are close to that of zero, to the largest."""
    fmt = Bits8()
    x, noise = blocks(2.0**-149, 2.0**126, 0)
    codes, scale = encoded(fmt, x, noise)
    scale = np.asarray(scale, np.float64)
    y = curve(x.astype(np.float64))
    largest = y.max(axis=0, keepdims=True)
    stored = x.max(axis=0, keepdims=True) >= TINY
    np.testing.assert_array_equal(scale > 0, stored)
    # float32 has 20 bits of v's mantissa in y, and drops the rest.
    assert (scale >= largest * (1 - 2.0**-23))[stored].all()
    assert (scale <= largest * 9 / 8).all()
    per_level = (264 * UNIT - 2) / np.where(stored, scale, 1.0)
    lowest = np.maximum(curve(np.zeros(1)) * per_level + UNIT + 8, 9 * UNIT)
    levels = np.maximum(y * per_level, lowest) - 137 * UNIT + 1
    check_codes(codes, levels, noise, (-128, 127), stored)
    got = decoded(fmt, codes, scale)
    moved = (curve(got) * per_level - levels) / UNIT - 137
    assert (np.abs(moved) < 1.001)[:, stored[0]].all()
    assert (got[:, ~stored[0]] == 0).all()
    assert (got[x >= TINY] > 0).all(), "a zero that is divided by"


def test_bits8_decodes_to_numbers_whatever_its_scale() -> None:
    """In tiny blocks some levels are below that of zero: there v would be negative."""
    ends = np.float32(curve(np.asarray([TINY, 2.0**126]))).view(np.int32) >> 16
    scales = (np.arange(ends[0], ends[1] + 1, dtype=np.int32) << 16).view(np.float32)
    scales, fmt = scales[None], Bits8()
    lowest = np.asarray(fmt.lowest(fmt.decoding(jnp.asarray(scales))), float)
    for value in (0.0, 1e-40, TINY):
        x = jnp.full(scales.shape, value, jnp.float32)
        for noise in (0, 1, NEAREST, UNIT - 1):
            codes = fmt.encode(x, jnp.asarray(scales), noise).astype(jnp.int8)
            got = decoded(fmt, codes, scales)
            assert (got >= lowest).all() and (got > 0).all() >= (value == TINY)
    # It is what code -128 decodes to, where that is above the y of zero.
    some = scales.astype(np.float64) * 9 / 264 > 2.0**-63 * (1 + 1e-6)
    bottom = decoded(fmt, np.full(some.sum(), -128, np.int8), scales[some])
    np.testing.assert_array_equal(lowest, np.where(some, lowest, 0.0))
    np.testing.assert_array_equal(lowest[some], bottom)


@linear
def test_no_code_of_linear8_wraps_around(relative: bool) -> None:
    fmt = Linear8(relative)
    x, noise = blocks(2.0**-149, 2.0**126, 1)
    x = x * np.random.default_rng(2).choice(np.asarray([-1, 1], np.float32), x.shape)
    codes, scale = encoded(fmt, x, noise)
    scale = np.asarray(scale, np.float64)
    largest = np.maximum(np.abs(x).max(axis=0, keepdims=True), LEAST).astype(float)
    assert (scale >= largest).all() and (scale <= largest * 129.0 / 128).all()
    levels = x * ((127 * UNIT - 2) / scale)
    check_codes(codes, levels, noise, (-127, 127), np.True_)
    assert (np.asarray(codes)[x == 0] == 0).all(), "zero stays zero"


@linear
@pytest.mark.parametrize("noise", [0, 1, 2, NEAREST, UNIT - 3, UNIT - 2, UNIT - 1])
def test_the_top_codes_of_linear8_with_every_scale(relative: bool, noise: int) -> None:
    """2 units of noise below 127: two of all 2**14 noises take the next code."""
    ends = np.asarray([LEAST, 2.0**126], np.float32).view(np.int32) >> 16
    top = (np.arange(ends[0], ends[1] + 1, dtype=np.int32) << 16).view(np.float32)
    codes, scale = encoded(Linear8(relative), np.stack([top, -top]), noise)
    np.testing.assert_array_equal(scale[0], top)
    inward = 127 - np.abs(np.asarray(codes, int)).T
    assert ((inward >= 0) & (inward <= [noise < 2, noise >= UNIT - 2])).all()


@mulaw
def test_no_code_of_mulaw_wraps_around(fmt: MuLaw) -> None:
    """The factor of a block is exact to 2**-22, and two roundings of float32 follow: in
    units of mulaw16's noise 16, 4 and 2, and 3 for the two bits of it that are not
    used. Units of mulaw8's are 64 times as large, and half of one is added at zero."""
    exact = 25 if fmt.width == 16 else 1
    x, noise = blocks(2.0**-149, 2.0**126, 3)
    codes, scale = encoded(fmt, x, noise)
    mirrored, _ = encoded(fmt, -x, noise)
    np.testing.assert_array_equal(mirrored, -codes)
    scale = np.asarray(scale, np.float64)
    largest = np.maximum(x.max(axis=0, keepdims=True), LEAST).astype(float)
    assert (scale >= largest).all() and (scale <= largest * 129.0 / 128).all()
    normal = (x >= TINY) | (x == 0)  # others may count as zeros
    levels, ends = code_of(fmt, x / scale) * UNIT, (0, 2 ** (fmt.width - 1) - 1)
    if isinstance(fmt, Mixed8):  # to the nearest from code 32 on
        normal &= np.abs(levels - 32 * UNIT) > exact
        noise = np.where(levels < 32 * UNIT, noise, NEAREST)
    check_codes(codes, levels, noise, ends, normal, exact)
    assert (np.asarray(codes)[x == 0] == 0).all(), "zero stays zero"


@mulaw
@pytest.mark.parametrize("noise", [0, 1, 3, NEAREST, UNIT - 3, UNIT - 2, UNIT - 1])
def test_the_top_codes_of_mulaw_with_every_scale(fmt: MuLaw, noise: int) -> None:
    """The largest has the top code, or with the least noise the one below."""
    ends = np.asarray([LEAST, 2.0**126], np.float32).view(np.int32) >> 16
    top = (np.arange(ends[0], ends[1] + 1, dtype=np.int32) << 16).view(np.float32)
    codes, scale = encoded(fmt, np.stack([top, -top]), noise)
    np.testing.assert_array_equal(scale[0], top)
    inward = 2 ** (fmt.width - 1) - 1 - np.abs(np.asarray(codes, int)).T
    assert ((inward >= 0) & (inward <= (noise < 4))).all()
    assert (np.sign(np.asarray(codes)).T == [1, -1]).all()


GRID = np.concatenate([np.linspace(-1, 1, 41), [0.5123, -0.01, 1e-4, -3e-7]])


@pytest.mark.parametrize("label", [k for k, (f, _, _) in CASES.items() if f.unbiased])
@pytest.mark.parametrize("top", [1.0, 1.37])
def test_rounding_is_unbiased(label: str, top: float) -> None:
    """The mean over all noise that there is, in codes: a thousandth of one matters."""
    fmt, _, signed = CASES[label]
    x = np.float32(top) * np.append(1.0, GRID if signed else np.abs(GRID))
    x = np.float32(x[x != 0])
    noise = np.arange(UNIT, dtype=np.int32)
    codes, scale = encoded(fmt, np.repeat(x[:, None], UNIT, axis=1), noise[None])
    got, exact = decoded(fmt, codes, scale), x.astype(np.float64)
    if isinstance(fmt, Bits8):
        got, exact = curve(got), curve(exact)
    code = 2.0 ** np.floor(np.log2(np.abs(exact))) / 128
    if isinstance(fmt, MuLaw):
        one = np.asarray(scale, float)[0, 0] / (TOPS[fmt] - 1)
        octave = np.log2(1 + np.abs(exact) / one) // 1
        code = one * 2.0**octave / STEPS[fmt]
    elif fmt.quantized:
        code = np.asarray(scale, float)[0, 0] / (264 if isinstance(fmt, Bits8) else 127)
    # In units of noise: 2 below the top, and 1 of float32.
    bias = np.abs(got.mean(axis=1) - exact) / code
    nearest = np.zeros(len(x), bool)
    if isinstance(fmt, Mixed8):
        nearest = code_of(fmt, np.abs(exact) / np.asarray(scale, float)[0, 0]) >= 32
        assert 0 < nearest.sum() < len(x) and (bias[nearest] <= 0.5).all()
        assert all(np.unique(row).size == 1 for row in got[nearest])
    assert (bias[~nearest] <= 3 * unit(fmt)).all()
    assert all(np.unique(row).size <= 2 for row in got)


# -------------------------------------------------------------------------- many steps


def many_steps(
    tx: optim.Transformation, alive: Any, count: int
) -> tuple[Any, np.ndarray]:
    """A random gradient for all, then `count` where `alive`: state and updates."""
    params = {"w": jnp.zeros((64, 128))}

    def step(state: Any, key: jax.Array) -> tuple[Any, Any]:
        g = jnp.where(alive, 1 + jax.random.normal(key, (64, 128)), 0.0)
        u, state = tx.update({"w": g}, state, params)
        return state, u["w"]

    keys = jax.random.split(jax.random.key(0), count)
    first = {"w": jax.random.normal(jax.random.key(1), (64, 128))}
    _, state = tx.update(first, tx.init(params), params)
    state, u = jax.jit(lambda s: jax.lax.scan(step, s, keys))(state)
    return state, np.asarray(u, np.float64)


@pytest.mark.parametrize("beta", [0.9, 0.95, 0.96])
def test_mixed8_without_gradients_decays_beside_a_largest_that_does_not(
    beta: float,
) -> None:
    """Codes from 32 on lose .64 of a code (beta = .96) or more in a step, and so 1:
    half as much again as they should, for a part of the way. Others are unbiased."""
    fmt, scale = Mixed8(), jnp.ones((1, 1))
    start, steps = np.linspace(0.02, 0.99, 64), round(4 / (1 - beta))

    def step(m: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = jax.random.randint(jax.random.key(k), m.shape, 0, UNIT)
        codes = fmt.encode(beta * m, scale, noise).astype(fmt.dtype)
        m = fmt.decode(widened(codes), scale)
        return m, m.mean(axis=1)

    m = jnp.broadcast_to(jnp.float32(start)[:, None], (64, 512))
    end, ms = jax.lax.scan(step, m, jnp.arange(steps))
    exact = start * beta * (1 - beta**steps) / (1 - beta)
    ratio = np.asarray(ms).sum(axis=0) / exact
    assert ratio.min() > 2 / 3 and ratio.max() < 4 / 3, (ratio.min(), ratio.max())
    assert np.linalg.norm(end.mean(axis=1)) < 1.5 * beta**steps * np.linalg.norm(start)


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999, 0.9999])
def test_momentum_of_mulaw8_without_gradients_decays(momentum: float) -> None:
    """On average as it should; its norm is a little longer, and shorter in every step.

    A step takes (1 - momentum) m, which goes to one of m's neighbours. That is 1/32 of
    it and of 1/14.75 of the largest away at most: of Gaussian numbers, a variance of
    (1 - momentum) m**2 / 28. When the scale has followed, all are rounded anew, which
    adds no more than that. So of 4 decays by e, noise has less than e**(4 / 14) - 1 =
    .33 of the square, and of 8,192 along the first ones sqrt(3 * .33 / 8192) = 1.1 %.
    """
    tx, count = optim.sgd(1.0, momentum=momentum), min(round(4 / (1 - momentum)), 3000)
    u = many_steps(tx, False, count)[1]
    norms = np.linalg.norm(u, axis=(1, 2))
    exact = float(np.float32(momentum)) ** np.arange(count)
    along = np.einsum("tij,ij->t", u, u[0]) / norms[0] ** 2
    np.testing.assert_allclose(along, exact, rtol=4 * 0.011)
    assert (norms / norms[0] <= 1.33**0.5 * exact).all()
    if momentum < 0.9999:  # there a step takes less than the noise of 8,192 values
        assert (np.diff(norms) < 0).all(), "it never grows"
    if momentum < 0.9999:  # there a step takes less than the noise of 8,192 values
        assert (np.diff(norms) < 0).all(), "it never grows"


@pytest.mark.parametrize("momentum", [0.999, 0.9999])
@pytest.mark.parametrize(
    ("state", "precision"), [("16bit", 2.0**-11), ("bf16", 2.0**-7)]
)
def test_slow_momentum_of_16_bits_without_gradients_decays(
    state: str, precision: float, momentum: float
) -> None:
    """A step takes a part 1 - momentum of m, which goes to one of its neighbours: a
    variance of at most that times `precision`, in units of m**2. So the square grows by
    4 `precision` at most in a decay by e**-4, the norm by half of it. And each step's
    product is rounded."""
    tx, count = optim.sgd(1.0, momentum=momentum, state=state), 3000
    norms = np.linalg.norm(many_steps(tx, False, count)[1], axis=(1, 2))
    exact = float(np.float32(momentum)) ** np.arange(count)
    rtol = 2 * precision + count * 2.0**-24
    np.testing.assert_allclose(norms / norms[0], exact, rtol=rtol)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_ratio8_heals_where_steps_without_gradients_grow(eps: float) -> None:
    """b1**2 > b2: Adam's own m / sqrt(v) grows by 1.6 % in a step without gradients.

    In 32 bits with eps 0 until it overflows. Here v is clamped up some day, and then m
    decays. As long as its quotient is large, the neighbours have few codes.
    """
    alive, every = jnp.arange(64)[:, None] % 2 == 0, []
    for stored in ("32bit", "8bit"):
        tx = optim.adam(1.0, b1=0.99, b2=0.95, eps=eps, state=stored)
        state, u = many_steps(tx, alive, 3500)
        every.append(u)
    moments = jax.tree.leaves(optim.dequantize(state))
    assert all(np.isfinite(x).all() for x in (u, *moments))
    assert np.abs(u[:, 1::2]).max() > 100, "it does grow"
    assert np.abs(u[-1, 1::2]).mean() < 1e-3, "and decays"
    exact, way = (u[1500:, ::2].sum(axis=0) for u in every)
    assert np.linalg.norm(way - exact) < 0.05 * np.linalg.norm(exact)
