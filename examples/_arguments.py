"""What the command lines of the examples have in common."""

import argparse
import math


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows a module's docstring as it is."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=form)


def count(text: str) -> int:
    """A positive integer."""
    if (value := int(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def seed(text: str) -> int:
    """An integer that random generators take."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def rate(text: str) -> float:
    """A learning rate."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
    return value
