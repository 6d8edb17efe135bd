"""Optimizers for JAX with 8-bit state: see `octavo.optim` and `octavo.schedules`."""

from importlib.metadata import version

__version__ = version("octavo")
