"""Formats keep what `docs/formats.md` promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.pallas_kernels import FORMATS as KERNEL_FORMATS
from octavo.pallas_kernels import Format, numbered
from octavo.pallas_kernels.formats import widened

from cases import FORMATS

CASES = [(name, signed) for name in FORMATS for signed in (True, False)]
QUANTIZED = [(n, s) for n, s in CASES if KERNEL_FORMATS[n](s).quantized]
TINY = float(np.finfo(np.float32).tiny)

all_formats = pytest.mark.parametrize(("name", "signed"), CASES)
quantized = pytest.mark.parametrize(("name", "signed"), QUANTIZED)


def round_trip(fmt: Format, x: np.ndarray) -> np.ndarray:
    """Store and load a block, through the stored types."""
    codes, scale = encoded(fmt, jnp.asarray(x, jnp.float32))
    stored = scale.astype(jnp.bfloat16).astype(jnp.float32)
    decoded = fmt.decode(widened(codes.astype(fmt.dtype)), stored)
    return np.asarray(decoded, np.float64)


def encoded(fmt: Format, x: jax.Array, noise: Any = 0.5) -> tuple[jax.Array, jax.Array]:
    """Codes, and the scales of blocks along the first axis."""
    scale = fmt.scale(jnp.max(fmt.magnitude(x), axis=0, keepdims=True))
    return fmt.encode(x, scale, noise), scale


@all_formats
def test_worst_relative_error_is_the_documented_one(name: str, signed: bool) -> None:
    fmt, case = KERNEL_FORMATS[name](signed), FORMATS[name][signed]
    x = np.geomspace(max(case.range, 1e-6), 1.0, 200_001).astype(np.float32)
    if signed:
        x = np.concatenate([x, -x])
    error = np.abs(round_trip(fmt, x) - x) / np.abs(x)
    assert error.max() <= case.worst * (1 + 1e-3)
    assert error.max() >= case.worst * 0.98, "the documentation is too pessimistic"


@quantized
def test_levels_are_those_computed_by_hand(name: str, signed: bool) -> None:
    fmt = KERNEL_FORMATS[name](signed)
    for code, value in FORMATS[name][signed].levels.items():
        got = fmt.decode(jnp.full((1, 1), code, jnp.int32), jnp.ones((1, 1)))
        np.testing.assert_allclose(got, value, rtol=3e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic8_is_the_code_book_of_bitsandbytes(signed: bool) -> None:
    """Its construction, in float64: cells of decades, sorted, with 0 and 1."""
    values = [0.0, 1.0]
    for e in range(7):
        borders = np.linspace(0.1, 1.0, (2**e if signed else 2 ** (e + 1)) + 1)
        centres = (borders[:-1] + borders[1:]) / 2 * 10.0 ** (e - 6)
        values += [*centres, *(-centres if signed else [])]
    book = np.sort(values)
    fmt = KERNEL_FORMATS["dynamic8"](signed)
    index = np.arange(256)
    codes = index - 127 if signed else index
    codes = np.where(codes > 127, codes - 256, codes).astype(np.int32)
    got = fmt.decode(jnp.asarray(codes)[:, None], jnp.ones((256, 1)))[:, 0]
    np.testing.assert_allclose(got, book, rtol=1e-6, atol=0)

    # And values go to the nearest of its codes.
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0, 1, 50_000), 10 ** rng.uniform(-8, 0, 50_000)])
    x = np.append(x * rng.choice([-1, 1], x.size) if signed else x, 1.0)
    nearest = np.abs(x[:, None] - book[None, :]).min(axis=1)
    distance = np.abs(round_trip(fmt, x) - x.astype(np.float32))
    clamped = (not signed) & (x > 0) & (x < book[1] / 2)
    bound = nearest + 3e-7 * np.abs(x)  # float32: of x, of the border, of the code
    assert (distance <= bound)[~clamped].all()


@all_formats
def test_zeros_are_exact_and_a_state_of_zeros_is_fresh(name: str, signed: bool) -> None:
    fmt = KERNEL_FORMATS[name](signed)
    np.testing.assert_array_equal(round_trip(fmt, np.zeros(32)), 0.0)
    fresh = fmt.decode(widened(jnp.zeros((32, 1), fmt.dtype)), jnp.zeros((1, 1)))
    np.testing.assert_array_equal(fresh, 0.0)


@all_formats
def test_nothing_nonzero_of_a_second_moment_is_stored_as_zero(
    name: str, signed: bool
) -> None:
    if signed:
        return  # first moments may flush to zero: steps become too small, not too large
    x = np.concatenate([[1.0], np.geomspace(TINY, 1.0, 10_000)])
    assert (round_trip(KERNEL_FORMATS[name](signed), x) > 0).all()


@quantized
def test_below_the_range_first_moments_flush_and_second_ones_are_clamped_up(
    name: str, signed: bool
) -> None:
    smallest = FORMATS[name][signed].smallest
    x = np.asarray([1.0, smallest, smallest / 4, smallest / 1e6])
    stored = [smallest, 0.0, 0.0] if signed else [smallest] * 3
    got = round_trip(KERNEL_FORMATS[name](signed), x)
    np.testing.assert_allclose(got[1:], stored, rtol=1e-6)


@all_formats
@pytest.mark.parametrize("largest", [TINY * 4, 1e-30, 1e-8, 1.0, 1e8, 1e30, 8e37])
def test_any_magnitude_keeps_its_precision(
    name: str, signed: bool, largest: float
) -> None:
    x = np.float32(largest) * np.asarray([1.0, 0.75, 0.5, 0.3], np.float32)
    case = FORMATS[name][signed]
    np.testing.assert_allclose(
        round_trip(KERNEL_FORMATS[name](signed), x), x, rtol=case.worst + 1e-6
    )


@all_formats
def test_denormals_do_no_harm(name: str, signed: bool) -> None:
    x = np.full(32, 1e-42, np.float32)
    got = round_trip(KERNEL_FORMATS[name](signed), x)
    assert np.isfinite(got).all() and (got <= 2e-42).all() and (got >= 0).all()


@quantized
def test_encoding_again_changes_nothing(name: str, signed: bool) -> None:
    """All codes of a block whose largest is the top code, which keeps the scale."""
    fmt = KERNEL_FORMATS[name](signed)
    codes = np.arange(-128, 128, dtype=np.int32)
    if name == "8bit" and signed:
        codes = codes[1:]  # -128 is no code of log8
    # root8's scale is an eighth root: 0.05 stands for values of 4e-11 and less.
    for scale in (1.0, 0.37109375, 0.05):
        scales = jnp.full((1, 1), scale).astype(jnp.bfloat16).astype(jnp.float32)
        x = fmt.decode(jnp.asarray(codes)[:, None], scales)
        again, new_scales = encoded(fmt, x)
        np.testing.assert_array_equal(again[:, 0], codes)
        np.testing.assert_array_equal(new_scales, scales)


@quantized
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_makes_the_scale_infinite(
    name: str, signed: bool, bad: float
) -> None:
    x = np.ones((8, 2), np.float32)
    x[3, 0] = bad
    _, scale = encoded(KERNEL_FORMATS[name](signed), jnp.asarray(x))
    assert np.isinf(scale[0, 0]) and np.isfinite(scale[0, 1])


@pytest.mark.parametrize("name", ["8bit", "bf16"])
def test_rounding_of_second_moments_is_unbiased(name: str) -> None:
    fmt = KERNEL_FORMATS[name](False)
    power = 8 if name == "8bit" else 1  # root8 is unbiased in the eighth root
    noise = (jnp.arange(4096.0) + 0.5)[None, :] / 4096
    for value in (0.9, 0.5123, 0.01):
        x = jnp.concatenate([jnp.ones((1, 4096)), jnp.full((1, 4096), value)])
        codes, scale = encoded(fmt, x, jnp.concatenate([noise * 0 + 0.5, noise]))
        root = fmt.decode(codes, scale)[1] ** (1 / power)
        np.testing.assert_allclose(root.mean(), value ** (1 / power), rtol=2e-5)


def test_every_format_has_a_number_of_its_own() -> None:
    """Which states and checkpoints hold: the same for ever."""
    formats = {KERNEL_FORMATS[name](signed) for name, signed in CASES}
    assert len({form.number for form in formats}) == len(formats)
    assert all(numbered(form.number) == form for form in formats)
