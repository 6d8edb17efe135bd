"""``python -m octavo.schedules "StepLR(0.1, step_size=30)" --steps 100``."""

import argparse
import sys
from collections.abc import Sequence

from . import Schedule, parse, plot, sparkline
from .plot import sample

# Steps to look at for the highest rate: all of them, in any usual run.
_MOST = 10_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Prints schedules as lines of blocks, or draws them into a file."""
    parser = argparse.ArgumentParser(
        prog="python -m octavo.schedules", description="Show learning rate schedules."
    )
    parser.add_argument(
        "schedule", nargs="+", help='such as "StepLR(0.1, step_size=30)"'
    )
    parser.add_argument("--steps", type=int, required=True, help="last step to show")
    parser.add_argument("--out", help="picture to write, such as lr.png")
    options = parser.parse_args(argv)
    try:
        shown = [parse(text) for text in options.schedule]
        if options.out:
            plot(shown, options.steps, path=options.out)
            print(f"wrote {options.out}")
            return 0
        for schedule in shown:
            print(_describe(schedule, options.steps))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _describe(schedule: Schedule, steps: int) -> str:
    where, rates = sample(schedule, steps, _MOST)
    top = rates.argmax()
    ends = f"step 0: {rates[0]:.4g}   step {steps}: {rates[-1]:.4g}"
    peak = f"highest: {rates[top]:.4g} at step {where[top]}"
    return f"{schedule}\n{sparkline(schedule, steps)}\n{ends}   {peak}"


if __name__ == "__main__":
    sys.exit(main())
