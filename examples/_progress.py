"""Progress bars that do not flood a log file."""

import sys
from typing import Any

from tqdm import tqdm


class Lines(tqdm):
    """The bar's numbers, in a new line for each tenth of the way."""

    def __init__(self, total: int, **settings: Any) -> None:
        self.tenths = -1  # as many as the last line told of
        shown = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        super().__init__(total=total, bar_format=shown, mininterval=0, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called at each step, and around what `write` prints."""
        del msg, pos
        tenths = 10 * self.n // self.total
        if tenths > self.tenths:
            self.tenths = tenths
            print(self, file=self.fp, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """What a line tells stays where it is."""


def progress(total: int, **settings: Any) -> tqdm:
    """A bar on a terminal, and lines where the output goes elsewhere.

    Args:
      total: how many steps there are.
      **settings: those of `tqdm`: `initial`, `desc`, `unit`.
    """
    kind = tqdm if sys.stderr.isatty() else Lines
    return kind(total=total, **settings)
