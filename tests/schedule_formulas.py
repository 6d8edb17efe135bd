"""The published formulas of schedules, in float64.

They are the plain ones, as the documentation of torch, Hugging Face and the papers
prints them, in Python numbers: nothing here knows how the library computes.
"""

import math
from collections.abc import Callable, Sequence


def line(start: float, end: float, part: float) -> float:
    return start + (end - start) * min(max(part, 0.0), 1.0)


def half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def polynomial(
    t: int,
    base: float,
    total: int,
    power: float = 1.0,
    end: float = 0.0,
    warmup: int = 0,
    init: float = 0.0,
) -> float:
    if t < warmup:
        return line(init, base, t / warmup)
    length = total - warmup
    return end + (base - end) * ((length - min(t - warmup, length)) / length) ** power


def restarts(t: int, base: float, first: int, mult: int, bottom: float) -> float:
    length = first
    while t >= length:
        t, length = t - length, length * mult
    return half_cosine(base, bottom, t / length)


def cyclic(
    t: int,
    base: float,
    top: float,
    up: int,
    down: int,
    scale: Callable[[int, int], float],
) -> float:
    cycle = math.floor(1 + t / (up + down))
    x = 1 + t / (up + down) - cycle
    share = up / (up + down)
    height = x / share if x <= share else (x - 1) / (share - 1)
    return base + (top - base) * height * scale(cycle, t)


def one_cycle(
    t: int,
    top: float,
    total: int,
    pct: float = 0.3,
    how: Callable[[float, float, float], float] = half_cosine,
    three: bool = False,
) -> float:
    low, final, t = top / 25.0, 1e4, min(t, total - 1)
    ends = [(pct * total - 1, low, top), (total - 1, top, low / final)]
    if three:
        back = (2 * pct * total - 2, top, low)
        ends = [ends[0], back, (total - 1, low, low / final)]
    begin = 0.0
    for end, start, stop in ends:
        if t <= end or end == total - 1:
            return how(start, stop, (t - begin) / (end - begin))
        begin = end
    raise AssertionError


def wsd(
    t: int,
    base: float,
    total: int,
    decay: int,
    warmup: int,
    shape: Callable[[float], float],
    end: float = 0.0,
) -> float:
    if t < warmup:
        return base * t / warmup
    part = min(max(t - (total - decay), 0) / decay, 1.0)
    return end + (base - end) * shape(part)


def waves(
    t: int, base: float, total: int, warmup: int, cycles: float, end: float
) -> float:
    if t < warmup:
        return base * t / warmup
    part = min((t - warmup) / (total - warmup), 1.0)
    return end + (base - end) * (1 + math.cos(2 * math.pi * cycles * part)) / 2


def product(factors: Sequence[float], t: int) -> float:
    return math.prod(factors[: min(t, len(factors))])
