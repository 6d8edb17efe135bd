"""Draw docs/img/formats.png from the formats' own encode and decode.

Run from anywhere: `python docs/build_formats.py`.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from octavo.pallas_kernels import FORMATS, Format
from octavo.pallas_kernels.formats import BFloat16, Bits8, Linear8, MuLaw
from octavo.pallas_kernels.rounding import NEAREST, NOISE_BITS

OUT = Path(__file__).parent / "img" / "formats.png"
WINDOW = 0.3  # decades that a point of an error curve is the worst of
_NOISES = (0, (1 << NOISE_BITS) - 1)  # unbiased rounding at its two extremes

# Okabe and Ito's colours, which differ for colour-blind readers, too.
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
PURPLE, SKY = "#cc79a7", "#56b4e9"
FIRST: list[tuple[Format, str, str]] = [
    (Linear8(), "ratio8 (8bit), of |m| / √v", BLUE),
    (MuLaw(8), "mulaw8 (8bit), of |m|", SKY),
    (FORMATS["dynamic8"](True, False), "dynamic8, of |m|", ORANGE),
    (BFloat16(), "bf16", GREEN),
    (MuLaw(16), "mulaw16 (16bit)", PURPLE),
]
SECOND: list[tuple[Format, str, str]] = [
    (Bits8(), "bits8 (8bit), unbiased", BLUE),
    (FORMATS["dynamic8"](False, False), "dynamic8, nearest", ORANGE),
    (BFloat16(), "bf16, unbiased", GREEN),
]


def scale_of_one(fmt: Format) -> jnp.ndarray:
    """The scale of a block whose largest is 1."""
    return fmt.scale(fmt.magnitude(jnp.ones((1, 1))))


def levels(fmt: Format) -> np.ndarray:
    """The positive values of all codes, ascending, in a block whose largest is 1."""
    codes = jnp.arange(-128, 128, dtype=jnp.int32)[:, None]
    values = np.asarray(fmt.decode(codes, scale_of_one(fmt)), np.float64)
    return np.unique(values[values > 0])


def stored(fmt: Format, x: np.ndarray, noise: int) -> np.ndarray:
    """What is left of x next to a block's largest value, 1."""
    scale = scale_of_one(fmt)
    codes = fmt.encode(jnp.asarray(x, jnp.float32)[:, None], scale, noise)
    stored = codes.astype(fmt.dtype).astype(jnp.int32) if fmt.quantized else codes
    return np.asarray(fmt.decode(stored, scale), np.float64)[:, 0]


def worst_errors(fmt: Format, magnitude: np.ndarray, signed: bool) -> np.ndarray:
    """Worst relative error of |m| or sqrt(v) within a window around each magnitude."""
    x = magnitude if signed else magnitude**2
    error = np.zeros(x.shape)
    for noise in _NOISES if fmt.unbiased else (NEAREST,):
        got = stored(fmt, x, noise)
        got = got if signed else np.sqrt(got)
        error = np.maximum(error, np.abs(got / magnitude - 1))
    decades = np.log10(magnitude)
    first = np.searchsorted(decades, decades - WINDOW / 2)
    end = np.searchsorted(decades, decades + WINDOW / 2)
    return np.asarray([error[i:j].max() for i, j in zip(first, end, strict=True)])


def draw_levels(axes: Axes, formats: list, signed: bool) -> None:
    """Magnitudes of the codes, in order."""
    for fmt, label, colour in formats:
        if fmt.dtype != jnp.int8:
            continue
        values = levels(fmt) if signed else np.sqrt(levels(fmt))
        index = np.arange(1, len(values) + 1)
        axes.plot(values, index, ".", ms=3.5, color=colour, label=label)
    axes.set_ylabel("code, in order of magnitude")
    axes.legend(loc="upper left", frameon=False)


def draw_errors(axes: Axes, formats: list, signed: bool, low: float) -> None:
    """Worst relative error against magnitude."""
    magnitude = np.geomspace(low / 2, 1, 20_001)[:-1]
    for fmt, _, colour in formats:
        worst = worst_errors(fmt, magnitude, signed)
        if isinstance(fmt, Linear8 | MuLaw):  # below its first code: that or zero
            worst[magnitude < levels(fmt)[0]] = np.nan
        axes.plot(magnitude, 100 * worst, color=colour, lw=1.5)
    axes.set_yscale("log")
    axes.set_ylim(0.02, 400)
    axes.set_yticks([0.03, 0.1, 0.3, 1, 3, 10, 30, 100])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylabel("worst relative error, %")
    axes.text(low * 3, 0.47, "bf16", color=GREEN)
    if signed:
        axes.text(1e-3, 0.025, "mulaw16", color=PURPLE)


def main() -> None:
    """Draw the four panels."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.color": "#e4e4e4", "axes.axisbelow": True})
    figure, panels = plt.subplots(2, 2, figsize=(9.6, 6.4), sharex="col")
    columns = [
        (FIRST, True, "First moments", "relative to the block's largest", 3e-8),
        (SECOND, False, "Second moments", "√v relative to the block's largest", 2e-10),
    ]
    for k, (formats, signed, title, quantity, low) in enumerate(columns):
        upper, lower = panels[:, k]
        draw_levels(upper, formats, signed)
        draw_errors(lower, formats, signed, low)
        upper.set_title(title)
        lower.set_xlabel(quantity)
        lower.set_xscale("log")
        lower.set_xlim(low, 1.6)
    left, right = panels[1]
    left.text(5e-5, 230, "below the first code: zero or that", color="#444444")
    left.text(5e-8, 125, "below its range: flushes to zero", color=ORANGE)
    right.text(4e-10, 125, "below: clamped up", color="#444444")
    figure.tight_layout()
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=100)


if __name__ == "__main__":
    main()
