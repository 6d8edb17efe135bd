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

OUT = Path(__file__).parent / "img" / "formats.png"
WINDOW = 0.3  # decades that a point of an error curve is the worst of
_NOISES = (0.0, 1.0 - 2.0**-24)  # unbiased rounding at its two extremes

# Okabe and Ito's colours, which differ for colour-blind readers, too.
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
FIRST: list[tuple[str, str, str]] = [
    ("8bit", "log8 (8bit)", BLUE),
    ("dynamic8", "dynamic8", ORANGE),
    ("bf16", "bf16", GREEN),
]
SECOND: list[tuple[str, str, str]] = [
    ("8bit", "root8 (8bit), unbiased", BLUE),
    ("dynamic8", "dynamic8, nearest", ORANGE),
    ("bf16", "bf16, unbiased", GREEN),
]


def levels(fmt: Format) -> np.ndarray:
    """The positive values of all codes, ascending, relative to the scale."""
    codes = jnp.arange(-128, 128, dtype=jnp.int32)[:, None]
    values = np.asarray(fmt.decode(codes, jnp.ones((256, 1))), np.float64)
    return np.unique(values[values > 0])


def stored(fmt: Format, x: np.ndarray, noise: float) -> np.ndarray:
    """What is left of x next to a block's largest value, 1."""
    scale = fmt.scale(fmt.magnitude(jnp.ones(1)))
    codes = fmt.encode(jnp.asarray(x, jnp.float32), scale, noise)
    return np.asarray(fmt.decode(codes, scale), np.float64)


def worst_errors(fmt: Format, magnitude: np.ndarray, signed: bool) -> np.ndarray:
    """Worst relative error of |m| or sqrt(v) within a window around each magnitude."""
    x = magnitude if signed else magnitude**2
    error = np.zeros(x.shape)
    for noise in _NOISES if fmt.unbiased else (0.5,):
        got = stored(fmt, x, noise)
        got = got if signed else np.sqrt(got)
        error = np.maximum(error, np.abs(got / magnitude - 1))
    decades = np.log10(magnitude)
    first = np.searchsorted(decades, decades - WINDOW / 2)
    end = np.searchsorted(decades, decades + WINDOW / 2)
    return np.asarray([error[i:j].max() for i, j in zip(first, end, strict=True)])


def draw_levels(axes: Axes, formats: list, signed: bool) -> None:
    """Magnitudes of the codes, in order."""
    for name, label, colour in formats:
        fmt = FORMATS[name](signed)
        if not fmt.quantized:
            continue
        values = levels(fmt) if signed else np.sqrt(levels(fmt))
        index = np.arange(1, len(values) + 1)
        axes.plot(values, index, ".", ms=3.5, color=colour, label=label)
    axes.set_ylabel("code, in order of magnitude")
    axes.legend(loc="upper left", frameon=False)


def draw_errors(axes: Axes, formats: list, signed: bool, low: float) -> None:
    """Worst relative error against magnitude."""
    magnitude = np.geomspace(low / 2, 1, 20_001)[:-1]
    for name, _, colour in formats:
        worst = worst_errors(FORMATS[name](signed), magnitude, signed)
        axes.plot(magnitude, 100 * worst, color=colour, lw=1.5)
    axes.set_yscale("log")
    axes.set_ylim(0.2, 400)
    axes.set_yticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.set_ylabel("worst relative error, %")
    axes.text(low * 3, 0.47, "bf16", color=GREEN)


def main() -> None:
    """Draw the four panels."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.color": "#e4e4e4", "axes.axisbelow": True})
    figure, panels = plt.subplots(2, 2, figsize=(9.6, 6.4), sharex="col")
    columns = [
        (FIRST, True, "First moments", "|m| relative to the block's scale", 3e-8),
        (SECOND, False, "Second moments", "√v relative to the block's scale", 2e-10),
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
    left.text(1.5e-7, 125, "below its range: flushes to zero", color="#444444")
    right.text(8e-5, 230, "dynamic8: clamped up", color=ORANGE, ha="right")
    figure.tight_layout()
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=100)


if __name__ == "__main__":
    main()
