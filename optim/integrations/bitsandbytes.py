"""States from those of bitsandbytes' and torch's optimizers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..checks import check_int
from ..convert import dequantize, requantize, unknown_norms
from ..storage.state import State, states_in
from ..storage.tree import path_name
from .matching import Match, NameMap, leaves_of, matched, steps_of
from .state_dict import read


def from_bitsandbytes(
    state_dict: Mapping[str, Any],
    params: Any,
    tx: optax.GradientTransformation,
    name_map: NameMap | None = None,
    names: Sequence[str] | None = None,
    count: int | None = None,
) -> Any:
    """The state with which an Octavo optimizer goes on where bitsandbytes stopped.

    Codes are decoded with the code book and the scales that are saved beside them, in
    blocks of 256 or 2048 values. Optimizers of torch itself are read, too. Everything
    is checked before anything is converted.

    Args:
      state_dict: what `optimizer.state_dict()` returned or `torch.load` read: Adam,
        AdamW, LAMB, AdEMAMix, Lion, SGD, LARS, RMSprop or Adagrad of bitsandbytes, in 8
        or 32 bits, paged or not; Adam, AdamW, Adamax, SGD, RMSprop or Adagrad of torch.
      params: the parameters, of any tree.
      tx: the same optimizer here, alone or in a chain, with any `state`. bitsandbytes'
        LARS is `optim.preset("lars-bitsandbytes", ...)`.
      name_map: from the path of a leaf (`layers/0/kernel`) to the parameter of torch:
        its name or number; or `(name, function)`, where the leaf is a function of the
        array; or `([name, ...], function)`, a function of several; or None: the moments
        of the leaf start anew. A dict, or a function of the path. Functions only move
        values: `np.transpose` for every kernel of a dense layer, also a square one.
        Default None, and for paths that a dict does not have: the path with dots.
      names: of the parameters, in the order of the `state_dict`, group by group.
        Default None: as saved, which torch does if it was given `named_parameters()`;
        else numbers.
      count: steps taken. Default None: as saved. It is needed where parameters took
        different numbers of them, since Octavo has one count, and for torch's SGD.

    Returns:
      What `tx.init(params)` returns, with the saved moments, rounded once to the
      nearest code of `tx`, and the count. On the way moments take 4 bytes per value.

    Raises:
      ValueError: if optimizers, trees or shapes differ, or something is missing.

    >>> import numpy as np
    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> weight = {"step": 7, "state1": np.ones((2, 3), np.float32)}
    >>> group = {"params": [0], "betas": (0.9, 0.99), "eps": 0.0}  # Lion's
    >>> state = optim.from_bitsandbytes(
    ...     {"state": {0: weight}, "param_groups": [group]},
    ...     {"kernel": jnp.zeros((3, 2))},
    ...     optim.lion(1e-4),
    ...     name_map={"kernel": (0, np.transpose)},
    ... )
    >>> print(state.count, state.mu["kernel"].shape)
    7 (3, 2)
    """
    fresh = tx.init(params)
    states = states_in(fresh)
    if not states:
        raise ValueError("tx is no optimizer of Octavo: take one, such as optim.adamw")
    leaves = [leaf for state in states for leaf in leaves_of(state, tx)]
    matches = matched(read(state_dict, names), leaves, name_map)
    taken = steps_of(list(matches.values())) if count is None else count
    check_int("count", taken)

    def converted(path: Any, x: Any) -> Any:
        if isinstance(x, State):
            return _converted(x, matches, taken)
        counts = path_name(path[-1:]) == "count" and jnp.shape(x) == ()
        return jnp.asarray(taken, jnp.result_type(x)) if counts else x

    return jax.tree_util.tree_map_with_path(
        converted, fresh, is_leaf=lambda x: isinstance(x, State)
    )


def _converted(state: State, matches: Mapping[str, Match], count: int) -> State:
    """The state with the moments that its leaves are matched with."""
    flat = {slot: state.codes(slot) for slot in state.slots}
    paths = next(iter(flat.values())).paths if flat else ()
    moments = [matches[p].moments() if p in matches else {} for p in paths]
    if not all(moments):  # some start anew
        fresh = {slot: jax.tree.leaves(x) for slot, x in dequantize(state).items()}
        anew = [{slot: x[n] for slot, x in fresh.items()} for n in range(len(paths))]
        moments = [m or new for m, new in zip(moments, anew, strict=True)]
    trees = {k: tree.replaced([m[k] for m in moments]) for k, tree in flat.items()}
    made = requantize(state, trees, count)
    return made._replace(extra=made.extra | unknown_norms(state))
