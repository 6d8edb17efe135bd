"""Values that an option may have for one leaf, and what they mean."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from octavo.pallas_kernels import (
    BACKENDS,
    FORMATS,
    ORTHOGONAL,
    SLOW,
    WEIGHTS,
    Format,
    Slot,
)

StateFormat: TypeAlias = str | Mapping[str, str]


def is_state(value: Any, slots: tuple[Slot, ...]) -> bool:
    """Whether a value says how slots are stored; otherwise it is a tree of such."""
    if isinstance(value, Mapping):
        names = {slot.name for slot in slots}
        return bool(names & set(value)) or not value
    return not is_tree(value)


def check_backend(name: Any, path: str = "") -> None:
    """Raise ValueError unless it is one, or None."""
    if name is not None:
        _check_name("backend", name, BACKENDS, path, ", or None for the best one")


def check_weights(name: Any, path: str = "") -> None:
    """Raise ValueError unless it is a way to store parameters, or None."""
    if name is not None and name == "paged32":
        raise ValueError(
            f"weights={name!r}{at(path)}: float32 weights, half of them in host memory,"
            " are parameters of bfloat16 with remainders, bit for bit, at half the "
            "traffic. Write weights='remainder16', paged=True"
        )
    if name is not None:
        _check_name("weights", name, WEIGHTS, path)


def is_by_leaf(value: Any) -> bool:
    """Whether an option may differ from leaf to leaf: a function, or a tree."""
    return callable(value) or (value is not None and is_tree(value))


def is_tree(value: Any) -> bool:
    """Whether a value is a tree of several, and no value itself."""
    return not jax.tree_util.all_leaves([value])


def formats_of(
    state: StateFormat, slots: tuple[Slot, ...], path: str = ""
) -> tuple[Format, ...]:
    """The formats that the option `state` of a leaf gives to its slots."""
    names = [slot.name for slot in slots]
    if isinstance(state, str):
        _check_format(state, path)
        state = dict.fromkeys(names, state)
    if not isinstance(state, Mapping) or set(state) != set(names):
        raise ValueError(
            f"state={state!r}{at(path)}: give one format, or one for each slot, "
            f"like {(dict.fromkeys(names, '8bit'))}"
        )
    for name in state.values():
        _check_format(name, path)
    return tuple(_format_of(state[slot.name], slot) for slot in slots)


def _format_of(name: str, slot: Slot) -> Format:
    if slot.orthogonal and name in ORTHOGONAL:
        return ORTHOGONAL[name]
    stored = SLOW.get(name, name) if slot.slow else name
    return FORMATS[stored](slot.signed, slot.relative_to is not None)


def embeddings_in_32bit(path: str) -> str:
    """For the option `state`: embeddings in 32 bits, all other leaves in 8.

    The rows of an embedding differ more than those of any other leaf: rare words have
    no gradients for thousands of steps. It is what bitsandbytes' `StableEmbedding`
    does. Embeddings are the leaves below a name that contains `embed`, or is `wte` or
    `wpe`.

    Args:
      path: of a leaf, "decoder/embedder/kernel".

    >>> from octavo import optim
    >>> tx = optim.adamw(1e-3, state=optim.embeddings_in_32bit)
    >>> [optim.embeddings_in_32bit(path) for path in ("wte/embedding", "mlp/up/kernel")]
    ['32bit', '8bit']
    """
    return "32bit" if _EMBEDDING.search(path) else "8bit"


_EMBEDDING = re.compile(r"embed|(^|/)(wte|wpe)(/|$)", re.IGNORECASE)


def at(path: str) -> str:
    """For errors: the leaf, if it is one of several."""
    return f" for {path!r}" if path else ""


def _check_format(name: Any, path: str) -> None:
    _check_name("state format", name, FORMATS, path)


def _check_name(
    what: str, name: Any, known: Iterable[str], path: str, more: str = ""
) -> None:
    """Raise ValueError unless a name is known."""
    if not (isinstance(name, str) and name in known):
        listed = ", ".join(repr(x) for x in known)
        raise ValueError(f"unknown {what} {name!r}{at(path)}; known are {listed}{more}")


def is_paged(value: Any) -> bool:
    """Whether it is a value of the option `paged`, for one leaf."""
    if isinstance(value, str):
        return value == "auto"
    return isinstance(value, bool | np.bool_)
