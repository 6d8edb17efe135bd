"""Octavo in the training loops of other libraries, and states of theirs."""
