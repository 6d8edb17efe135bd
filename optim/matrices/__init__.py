"""Optimizers that step whole matrices: which leaves those are, and on which device."""
