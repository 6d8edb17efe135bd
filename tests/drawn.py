"""Problems at random: an optimizer, options in every spelling, a tree of leaves."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from octavo.pallas_kernels import WEIGHTS, has_16_bits

from cases import FORMATS, RULES

STEPS = 2
RATE = 0.02
# Whole blocks and parts of one, odd ones, one value, none.
LENGTHS = (1, 2, 3, 4, 7, 8, 16, 17, 31, 33, 64, 70, 0)
MOST_VALUES = 3000
DTYPES = ("float32", "bfloat16", "float16", "int32", "complex64", "float", "numpy")
KEYS = ("kernel", "bias", "a", "a/b", "0")


@dataclass(frozen=True)
class Shape:
    """A leaf before it has values; `float` is one of Python, `numpy` float64's."""

    lengths: tuple[int, ...]
    dtype: str


class Problem(NamedTuple):
    """What is drawn.

    Attributes:
      rule: a row of `RULES`.
      params: a tree.
      grads: trees like it, for each step.
      options: as they are written, `learning_rate` among them.
      leaves: name of an option -> path -> what it says of that leaf.
      wrong: the name of the option that is wrong, or "gradient"; None: nothing is.
    """

    rule: str
    params: Any
    grads: list[Any]
    options: dict[str, Any]
    leaves: dict[str, dict[str, Any]]
    wrong: str | None


def paths_of(tree: Any, at: tuple[Any, ...] = ()) -> list[str]:
    """Of the leaves of a tree that is itself at a path, as errors write them."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    whole = [(*at, *path) for path, _ in flat]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in whole]


# --------------------------------------------------------------------------- trees


@st.composite
def leaf_shapes(draw: Any) -> Shape:
    """Ranks from 0 to 4."""
    dtype = draw(st.sampled_from(DTYPES))
    lengths: tuple[int, ...] = ()
    rank = 0 if dtype == "float" else draw(st.integers(0, 4))
    for _ in range(rank):
        allowed = [n for n in LENGTHS if n * math.prod(lengths) <= MOST_VALUES]
        lengths = (*lengths, draw(st.sampled_from(allowed)))
    return Shape(lengths, dtype)


def trees() -> st.SearchStrategy[Any]:
    """Dicts, lists and tuples in each other, with None here and there."""
    leaves = st.one_of(leaf_shapes(), leaf_shapes(), leaf_shapes(), st.none())
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
        ),
        max_leaves=3,
    )


def values_of(tree: Any, seed: int, size: float, zeros: float) -> Any:
    """A tree of arrays; magnitudes within a block are at most 2**10 apart, or zero."""
    rng = np.random.default_rng(seed)

    def one(shape: Shape) -> np.ndarray:
        x = rng.choice([-1.0, 1.0], shape.lengths)
        x = x * 2.0 ** rng.uniform(-6, 4, shape.lengths) * size
        return np.where(rng.random(shape.lengths) < zeros, 0.0, x)

    def filled(shape: Shape) -> Any:
        if shape.dtype == "complex64":
            return jnp.asarray(one(shape) + 1j * one(shape), shape.dtype)
        x = one(shape)
        if shape.dtype == "float":
            return float(x)
        return x if shape.dtype == "numpy" else jnp.asarray(x, shape.dtype)

    return jax.tree.map(filled, tree)


# --------------------------------------------------------------------------- options

# What a group of leaves, given by their paths, may have in common.
Values: TypeAlias = Callable[[Sequence[str]], st.SearchStrategy[Any]]
FORMS = ("one", "tree", "prefix", "function")


@st.composite
def per_leaf(
    draw: Any, params: Any, values: Values, forms: Sequence[str] = FORMS
) -> tuple[Any, dict[str, Any]]:
    """An option as it is written, and what it says of each path."""
    form = draw(st.sampled_from(forms))
    if form == "one" or not paths_of(params):
        value = draw(values(paths_of(params)))
        return value, dict.fromkeys(paths_of(params), value)
    top = (lambda x: x is not params) if form == "prefix" else None
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=top)
    groups = [paths_of(child, path) for path, child in flat]
    chosen = [draw(values(group)) for group in groups]
    pairs = zip(groups, chosen, strict=True)
    said = {path: value for group, value in pairs for path in group}
    return said.__getitem__ if form == "function" else treedef.unflatten(chosen), said


def states_of(rule: str) -> Values:
    """By name, or by slot."""
    names, formats = [s.name for s in RULES[rule].slots], st.sampled_from([*FORMATS])
    by_slot = st.fixed_dictionaries(dict.fromkeys(names, formats))
    return lambda group: st.one_of(formats, by_slot) if names else formats


def axes_of(ranks: Mapping[str, int], taken: Mapping[str, Any]) -> Values:
    """Axes that all leaves of a group have, as ints of either sign, or None."""

    def fits(axis: int, path: str) -> bool:
        rank = ranks[path]
        return -rank <= axis < rank and axis % rank not in taken.get(path, ())

    def values(group: Sequence[str]) -> st.SearchStrategy[Any]:
        axes = [k for k in range(-4, 4) if all(fits(k, path) for path in group)]
        return st.sampled_from([None, *axes] if group else [None])

    return values


def tuples_of(values: Values) -> Values:
    """Several of these, too."""

    def several(group: Sequence[str]) -> st.SearchStrategy[Any]:
        some = st.lists(values(group).filter(lambda k: k is not None), max_size=2)
        return st.one_of(values(group), some.map(tuple) if group else st.just(()))

    return several


def weights_of(types: Mapping[str, Any]) -> Values:
    """By name; what is kept beside parameters of 16 bits only where all are such."""

    def values(group: Sequence[str]) -> st.SearchStrategy[Any]:
        short = group and all(has_16_bits(types[path]) for path in group)
        return st.sampled_from([*WEIGHTS] if short else ["nearest", "stochastic", None])

    return values


def just(*values: Any) -> Values:
    """One of these, whatever the leaves."""
    return lambda group: st.sampled_from(values)


@st.composite
def options_of(
    draw: Any, rule: str, params: Any
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Options that are right, and what they say leaf by leaf."""
    case, written, said = RULES[rule], {}, {}
    leaves = dict(zip(paths_of(params), jax.tree.leaves(params), strict=True))
    ranks = {path: jnp.ndim(x) for path, x in leaves.items()}
    types = {path: jnp.result_type(x) for path, x in leaves.items()}
    # A tuple of ints is one value: where parameters are a tuple it is no tree.
    tuples = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, tuple))
    plain = not any(isinstance(x, tuple) for x in tuples)
    spelled: dict[str, Any] = {
        "state": (states_of(rule), FORMS),
        "block_size": (just(8, 16, 32, 40, 128), FORMS),
        "min_shards": (just(1, 2, 3, 16), FORMS),
        "backend": (just("xla", None), FORMS),
        "weights": (weights_of(types), FORMS),
        "paged": (just(True, False, "auto"), FORMS),
        "lr_scale": (just(1.0, 0.5, 0.0, 2, np.float32(0.25)), FORMS),
        "layer_axes": (
            tuples_of(axes_of(ranks, {})),
            FORMS if plain else ("one", "function"),
        ),
    }
    if "weight_decay" in case.kwargs:
        spelled["weight_decay"] = (just(0.0, 0.1, np.float32(0.25)), FORMS)
    for name, (values, forms) in spelled.items():
        if draw(st.booleans()):
            written[name], said[name] = draw(per_leaf(params, values, forms))
    said["layer_axes"] = {
        path: _layers(x, ranks[path]) for path, x in said.get("layer_axes", {}).items()
    }
    if draw(st.booleans()):
        axes = axes_of(ranks, said["layer_axes"])
        written["block_axis"], _ = draw(per_leaf(params, axes))
    if "auto" in said.get("paged", {}).values():
        written["device_bytes"] = draw(st.sampled_from((2**20, 80 * 10**9)))
    # RMSprop's momentum holds the learning rate already, which is not to be limited.
    takes = {
        "max_unorm": case.max_unorm and rule != "rmsprop-all",
        "record_norms": bool(case.slots),
    }
    for name, values in NUMBERS.items():
        if draw(st.integers(0, 3)) == 0 and takes.get(name, True):
            written[name] = draw(st.sampled_from(values))
    written["min_quantized_size"] = draw(st.sampled_from((0, 0, 0, 16, 4096)))
    return written, said


def _layers(axes: Any, rank: int) -> tuple[int, ...]:
    given = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return tuple(sorted({k % rank for k in given}))


NUMBERS: dict[str, tuple[Any, ...]] = {
    "grad_clip_norm": (1.0, 30, np.float32(5.0)),
    "grad_clip_value": (0.5, 2, np.float32(1e-3)),
    "max_unorm": (0.02, 1),
    "skip_nonfinite": (True, False, np.True_),
    "record_norms": (True,),
    "seed": (7, 2**31 - 1),
}
_NAN, _INF, _MANY = float("nan"), float("inf"), np.ones(3, np.float32)
_LIMITS = (0.0, -1, _NAN, "1", _MANY, [1.0], 1j, {"a": 1.0})
_FACTORS = (-1.0, _NAN, _INF, "1", True, _MANY, 1j, lambda path: -1.0, {"no": 1.0})
WRONG: dict[str, tuple[Any, ...]] = {
    "learning_rate": (-1.0, _NAN, _INF, "fast", [0.1], True, 1j, lambda count: _MANY),
    "state": ("7bit", 8, {"mu": "8bit", "no": "8bit"}, {"no": "8bit"}, lambda path: 1),
    "block_size": (12, 0, -32, 32.0, "32", True, lambda path: 20, {"no": 32}),
    "block_axis": (9, -9, 0.5, "0", True, lambda path: 7, {"no": 0}),
    "layer_axes": (5, -7, 0.5, "0", (0, 9), lambda path: "0", {"no": 0}),
    "min_shards": (0, -1, 2.0, True, "8", lambda path: 0, {"no": 2}),
    "min_quantized_size": ("4k", 1.5, True, _MANY),
    "seed": (0.5, "0", True, _MANY),
    "weights": ("bf16", 8, {"no": "nearest"}, lambda path: "remainder4"),
    "paged": ("Auto", 1, "yes", {"no": True}, lambda path: "all"),
    "device_bytes": (0, -1, 8e9, "8e9", True, _MANY),
    "page_bytes": (6.4e7, "64MiB", True),
    "backend": ("cuda", 3, {"no": "xla"}, lambda path: "gpu"),
    "lr_scale": _FACTORS,
    "weight_decay": _FACTORS,
    "grad_clip_norm": _LIMITS,
    "grad_clip_value": _LIMITS,
    "max_unorm": _LIMITS,
    "percentile_clipping": (0, 101, 5.0, True, "5", _MANY),
    "skip_nonfinite": (1, "yes", _MANY),
    "record_norms": (0, _MANY),
    "blocksize": (32,),
}


@st.composite
def problems(draw: Any) -> Problem:
    """One of two is right in everything; in the others, one thing is wrong."""
    rule = draw(st.sampled_from([*RULES]))
    shapes = draw(trees())
    seed, zeros = draw(st.integers(0, 99)), draw(st.sampled_from((0.0, 0.3)))
    sizes = draw(st.lists(st.sampled_from((1e-3, 1.0, 30.0)), min_size=2, max_size=2))
    params = values_of(shapes, seed, 0.5, zeros)
    paths = paths_of(params)
    assume(params is not None and len(set(paths)) == len(paths))
    grads = [values_of(shapes, seed + 1 + k, x, zeros) for k, x in enumerate(sizes)]
    options, said = draw(options_of(rule, params))
    rates = (RATE, np.float32(RATE), jnp.float32(RATE), lambda count: RATE)
    options["learning_rate"] = draw(st.sampled_from(rates))
    wrong = draw(st.sampled_from((None, None, "option", "gradient")))
    if wrong == "option":
        known = [x for x in WRONG if x != "weight_decay" or x in RULES[rule].kwargs]
        wrong = draw(st.sampled_from(known))
        options[wrong] = draw(st.sampled_from(WRONG[wrong]))
    elif wrong == "gradient":
        grads[0] = jax.tree.map(lambda g: jnp.asarray(g)[None], grads[0])
    return Problem(rule, params, grads, options, said, wrong)
