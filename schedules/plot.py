"""Pictures of schedules: a figure, or a line of blocks in the terminal."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from .domains import Whole, check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Callable[[jax.Array], jax.typing.ArrayLike]

_BLOCKS = "▁▂▃▄▅▆▇█"
# Points of a curve: as many as a wide picture has pixels, twice over.
_POINTS = 4000


def plot(
    schedule: Curve | Sequence[Curve],
    steps: int,
    *,
    labels: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draws one schedule, or several in one figure, from step 0 to ``steps``.

    Args:
        schedule: schedules of this package, or any functions of optax.
        steps: last step to draw, at least 1. Above 4,000, as many steps are picked
            evenly.
        labels: a name for each; what ``repr`` shows by default.
        path: file to write as well, in the format of its ending.

    Returns:
        A matplotlib figure, which notebooks show.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no schedule, ``steps`` below 1, labels that do not fit.

    Example:
        >>> from octavo import schedules
        >>> figure = schedules.plot(schedules.StepLR(0.1, step_size=30), 100)
        >>> len(figure.axes[0].lines)
        1
    """
    curves = [schedule] if callable(schedule) else list(schedule)
    if not curves:
        raise ValueError("plot was given no schedule; write plot(schedule, steps)")
    names = [repr(curve) for curve in curves] if labels is None else list(labels)
    if len(names) != len(curves):
        raise ValueError(f"plot: {len(curves)} schedules and {len(names)} labels")
    figure = _figure()
    axes = figure.add_subplot()
    for curve, name in zip(curves, names, strict=True):
        where, rates = sample(curve, steps, _POINTS)
        axes.plot(where, rates, label=name, linewidth=1.8)
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, steps))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure


def sparkline(schedule: Curve, steps: int, width: int = 60) -> str:
    """The schedule from step 0 to ``steps`` as a line of ``width`` blocks.

    Example:
        >>> from octavo import schedules
        >>> schedules.sparkline(schedules.PolynomialLR(0.1, 100), 100, width=16)
        '██▇▇▆▆▅▅▄▄▃▃▂▂▁▁'
    """
    rates = sample(schedule, steps, check("sparkline", "width", width, Whole(1)))[1]
    low, high = rates.min(), rates.max()
    heights = (rates - low) / (high - low) if high > low else np.zeros_like(rates)
    levels = np.rint(heights * (len(_BLOCKS) - 1)).astype(int)
    return "".join(_BLOCKS[level] for level in levels)


def sample(schedule: Curve, steps: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` steps from 0 to ``steps``, and the rates there."""
    steps = check("plot", "steps", steps, Whole(1))
    where = np.linspace(0, steps, min(points, steps + 1)).round().astype(np.int64)
    counts = jnp.asarray(where, jnp.int32)
    # One step at a time, as training calls it: constants have no other shape.
    rates = jax.vmap(lambda count: jnp.asarray(schedule(count)))(counts)
    return where, np.asarray(rates, np.float64)


def _figure() -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot needs matplotlib; install it, or print sparkline(schedule, steps)"
        ) from error
    return Figure(figsize=(7.0, 3.6), layout="constrained")
