"""State_dicts of bitsandbytes, written from its formulas, and its steps in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from octavo import optim

Arrays = dict[str, np.ndarray]
LR, STEPS = 2.0**-7, 5
NESTED = "__bnb_optimizer_quant_state__"
# The first two have codes, the second with a block at its end that is not full, in
# either size of blocks; the last is too small for codes.
SHAPES = {"a": (64, 80), "b": {"c": (100, 50), "d": (37,)}}


def code_book(signed: bool) -> np.ndarray:
    """bitsandbytes' `create_dynamic_map`: cells that are equal within each decade."""
    found = [0.0, 1.0]
    for decade in range(7):
        cells = 2**decade * (1 if signed else 2)
        edges = np.linspace(0.1, 1.0, cells + 1)
        centers = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        found += [*centers, *(-centers if signed else ())]
    assert len(found) == 256
    return np.sort(np.float32(found))


def quantized(x: np.ndarray, size: int, signed: bool) -> tuple[Any, Any, Any]:
    """Codes, their book, and the largest of each block."""
    book = code_book(signed)
    blocks = [x.ravel()[k : k + size] for k in range(0, x.size, size)]
    scales = np.array([np.abs(block).max() for block in blocks], np.float32)
    codes = [
        np.abs(book - block[:, None] / scale).argmin(1)
        for block, scale in zip(blocks, scales, strict=True)
    ]
    return np.concatenate(codes).astype(np.uint8).reshape(x.shape), book, scales


class Case(NamedTuple):
    """An optimizer of bitsandbytes, and ours.

    Attributes:
      ours: with the hyperparameters of `group`.
      group: what its parameter groups have. The betas are exact in float32.
      slots: ours, in the order of theirs: in `state1`, then in `state2`.
      step: `(g, moments, t)` to what the learning rate multiplies, in float64.
    """

    ours: Callable[..., Any]
    group: dict[str, Any]
    slots: tuple[tuple[str, ...], ...]
    step: Callable[..., Any]


B1, B2, B3 = 0.875, 0.9375, 0.96875
TWO = {"betas": (B1, B2), "eps": 1e-6, "alpha": 0.0}


def adam(g: Any, s: Any, t: int) -> Any:
    """Also the denominator of AdEMAMix."""
    m, v = B1 * s["mu"] + (1 - B1) * g, B2 * s["nu"] + (1 - B2) * g**2
    return m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + 1e-6)


def ademamix(g: Any, s: Any, t: int) -> Any:
    """arXiv 2409.03137, without schedules."""
    m1, m2 = B1 * s["m1"] + (1 - B1) * g, B3 * s["m2"] + (1 - B3) * g
    v = B2 * s["nu"] + (1 - B2) * g**2
    return (m1 / (1 - B1**t) + 4.0 * m2) / (np.sqrt(v / (1 - B2**t)) + 1e-6)


CASES = {
    "adam": Case(
        lambda **o: optim.adam(LR, B1, B2, 1e-6, **o), TWO, (("mu",), ("nu",)), adam
    ),
    "ademamix": Case(
        lambda **o: optim.ademamix(LR, B1, B2, B3, 4.0, 1e-6, **o),
        TWO | {"betas": (B1, B2, B3), "alpha": 4.0},
        (("m1", "m2"), ("nu",)),
        ademamix,
    ),
    "lion": Case(
        lambda **o: optim.lion(LR, B1, B2, 0.0, **o),
        {"betas": (B1, B2), "eps": 0.0},
        (("mu",),),
        lambda g, s, t: np.sign(B1 * s["mu"] + (1 - B1) * g),
    ),
    "sgd": Case(
        lambda **o: optim.sgd(LR, B1, **o),
        {"betas": (B1, 0), "eps": 0.0},
        (("trace",),),
        lambda g, s, t: B1 * s["trace"] + g,
    ),
    "rmsprop": Case(
        lambda **o: optim.rmsprop(LR, B2, 1e-6, eps_in_sqrt=False, **o),
        {"betas": (B2, 0), "eps": 1e-6},
        (("nu",),),
        lambda g, s, t: g / (np.sqrt(B2 * s["nu"] + (1 - B2) * g**2) + 1e-6),
    ),
    "adagrad": Case(
        lambda **o: optim.adagrad(LR, 0.0, 1e-6, eps_in_sqrt=False, **o),
        {"betas": (0.0, 0.0), "eps": 1e-6},
        (("sum_of_squares",),),
        lambda g, s, t: g / (np.sqrt(s["sum_of_squares"] + g**2) + 1e-6),
    ),
}


def values(seed: int, scale: float = 1.0) -> Any:
    """A tree of normal numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: np.float32(scale * rng.standard_normal(s)),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def flat(tree: Any) -> list[Any]:
    """The leaves, which are numbers 0, 1 and 2 of torch."""
    return jax.tree.leaves(tree)


def written(
    case: Case, size: int = 256, nested: bool = True, step: Any = STEPS
) -> tuple[dict[str, Any], list[Arrays]]:
    """A state_dict, and the moments of each parameter that it stands for, by slot."""
    rng, state, stood = np.random.default_rng(0), {}, []
    for k, p in enumerate(flat(values(1))):
        entry: Any = {}
        found: Arrays = {}
        for n, slots in enumerate(case.slots, 1):
            squares = slots[0] in ("nu", "sum_of_squares")
            arrays: Any = {f"state{n}": [], f"absmax{n}": []}
            for slot in slots:
                x = np.float32(rng.standard_normal(p.shape))
                x = x * x if squares else x
                if p.size < 4096:
                    arrays[f"state{n}"].append(x)
                else:
                    # The book of the first is signed, whatever it holds.
                    codes, book, scales = quantized(x, size, signed=n == 1)
                    arrays[f"state{n}"].append(codes)
                    arrays[f"absmax{n}"].append(scales)
                    entry[f"qmap{n}"] = book
                    each = scales[np.arange(p.size) // size].reshape(p.shape)
                    x = book[codes] * each
                found[slot] = x
            two = len(slots) > 1
            entry |= {k: np.stack(x) if two else x[0] for k, x in arrays.items() if x}
        state[k] = {"step": step} | ({NESTED: entry} if nested else entry)
        stood.append(found)
    return {"state": state, "param_groups": [case.group | {"params": [0, 1, 2]}]}, stood


IN_ORDER = {"a": 0, "b/c": 1, "b/d": 2}
