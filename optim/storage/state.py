"""The state of an optimizer: a named tuple of trees of plain arrays.

Codes have the parameter's own shape and scales its rank (in host memory both have rows
in groups: `Storage.folded`), so that whatever shards,
partitions, maps or stores parameters does the same to the state without knowing
Octavo: optax, Flax linen and nnx, Orbax, regular expressions on paths.
"""

from collections import namedtuple
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Leaf, Storage, unfolded

from .tree import Leaves

_SCALE = "_scale"
REMAINDER = "remainder"


class State:
    """What an Octavo optimizer remembers: a named tuple, as optax' states are.

    Unless a slot starts with another value, a state of zeros is a fresh one. Bytes per
    parameter of 8-bit Adam with blocks of 32: 2 for the codes and 2 * 2 / 32 for the
    scales, 2.125 together.

    Attributes:
      count: int32, shape (): steps taken.
      mu, nu (or trace, ...): for each slot a tree like the parameters: codes of
        p.shape (int8), or the moments themselves where a leaf is not quantized.
      mu_scale, nu_scale (...): likewise: bf16, p.shape with the blocked axis shortened
        to one value per block. Leaves that are not quantized have (unused) entries,
        too; slots that never are have no tree.
      remainder: with `weights="remainder8"` or `"remainder16"`, likewise: what rounding
        of the parameters lost, int8 or int16 of p.shape; see `optim.masters`. Leaves
        that have none have an (unused) entry of their scales' shape.
      extra: `format` holds one key, which names the formats of the slots, so that a
        state written with another code book has another structure and cannot be
        loaded by mistake; below it, for conversions, is an int32 array of how each
        leaf is stored (see `optim/storage/table.py`). No step reads it. Options add
        `skipped` (int32, steps not taken), `clip_history` (float32, (leaves, 100):
        squared norms) and `norms` (see `octavo.optim.last_norms`).
    """

    __slots__ = ()

    if TYPE_CHECKING:
        _fields: tuple[str, ...]
        count: jax.Array
        extra: dict[str, Any]

        def _replace(self, **fields: Any) -> "State": ...
        def _asdict(self) -> dict[str, Any]: ...
        def __getattr__(self, name: str) -> Any: ...

    @property
    def slots(self) -> tuple[str, ...]:
        """The moments' names."""
        others = ("count", REMAINDER, "extra")
        return tuple(
            f for f in self._fields if f not in others and not f.endswith(_SCALE)
        )

    def codes(self, slot: str) -> Leaves:
        """The codes of a slot, flat."""
        return Leaves.of(getattr(self, slot))

    def scales(self, slot: str) -> Leaves | None:
        """The scales of a slot, flat; None if it never has any."""
        tree = getattr(self, scale_name(slot), None)
        return None if tree is None else Leaves.of(tree)

    @property
    def remainders(self) -> Leaves | None:
        """What rounding of the parameters lost, flat; None if it is not kept."""
        tree = getattr(self, REMAINDER, None)
        return None if tree is None else Leaves.of(tree)

    @property
    def trees(self) -> dict[str, Any]:
        """The trees like the parameters, by field."""
        return {f: x for f, x in self._asdict().items() if f not in ("count", "extra")}

    def __reduce__(self) -> Any:  # its class is made, not imported
        return _made, (self._asdict(),)


def fields_of(
    slots: Sequence[str], quantized: Sequence[bool], remainders: bool = False
) -> tuple[str, ...]:
    """The fields of a state with these slots, some of which have scales."""
    pairs = zip(slots, quantized, strict=True)
    scales = (scale_name(slot) for slot, has in pairs if has)
    last = (REMAINDER,) if remainders else ()
    return ("count", *slots, *scales, *last, "extra")


@cache
def state_class(fields: tuple[str, ...]) -> type[State]:
    """The named tuple with these fields; always the same one, as JAX demands."""
    base = namedtuple("State", fields)  # type: ignore[misc]
    return type("State", (State, base), {"__slots__": (), "__doc__": State.__doc__})


def _made(fields: dict[str, Any]) -> State:
    return state_class(tuple(fields))(**fields)  # type: ignore[call-arg]


def scale_name(slot: str) -> str:
    """Field of a slot's scales."""
    return slot + _SCALE


def states_in(tree: Any) -> list[State]:
    """The states of Octavo optimizers in a tree."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, State))
    return [x for x in nodes if isinstance(x, State)]


class StateLeaves(NamedTuple):
    """The trees of a state, flat: for each slot its codes, and its scales or None."""

    codes: list[Leaves]
    scales: list[Leaves | None]
    remainders: Leaves | None

    @classmethod
    def of(cls, state: Any, fields: Sequence[str], tag: str, extra: set[str]) -> Any:
        """Flatten.

        Args:
          state: the state.
          fields: what this optimizer's states have.
          tag: their format tag.
          extra: the keys of their `extra`.

        Raises:
          ValueError: if another optimizer or another format made the state.
        """
        if not isinstance(state, State):
            raise ValueError(
                f"the state is a {type(state).__name__}, not that of an Octavo "
                "optimizer: pass what tx.init or the last step returned"
            )
        _check_keys("state", state._fields, fields)
        _check_keys("state.extra", state.extra, extra)
        _check_keys('state.extra["format"]', state.extra["format"], (tag,))
        slots = state.slots
        codes, scales = map(state.codes, slots), map(state.scales, slots)
        return cls(list(codes), list(scales), state.remainders)

    def leaf(self, i: int, path: str, storage: Storage, g: Any, p: Any) -> Leaf:
        """The arrays of leaf i, checked.

        Raises:
          ValueError: unless the state of the leaf is stored as it should be.
        """
        codes = tuple(c.leaves[i] for c in self.codes)
        scales = tuple(
            s.leaves[i] if f.quantized and s is not None else None
            for f, s in zip(storage.formats, self.scales, strict=True)
        )
        for k, (code, scale) in enumerate(zip(codes, scales, strict=True)):
            expected = storage.codes(k)
            got = jnp.result_type(code)
            _check(got == expected.dtype, path, "state of type", got, expected.dtype)
            got = jnp.shape(code)
            _check(got == expected.shape, path, "state of shape", got, expected.shape)
            if scale is not None:
                shape, got = storage.scales(k).shape, jnp.shape(scale)
                _check(got == shape, path, "scales of shape", got, shape)
        remainder = None
        if storage.has_remainder and self.remainders is not None:
            remainder = self.remainders.leaves[i]
            for name in ("dtype", "shape"):
                got, want = (getattr(x, name) for x in (remainder, storage.remainder))
                _check(got == want, path, f"remainder of {name}", got, want)
        return Leaf(g, p, codes, scales, remainder)

    def replaced(self, state: State, results: Sequence[Leaf]) -> dict[str, Any]:
        """The trees of the state, with the codes and scales of leaves after a step."""
        trees = {}
        for k, slot in enumerate(state.slots):
            trees[slot] = self.codes[k].replaced([r.codes[k] for r in results])
            before = self.scales[k]
            if before is not None:
                pairs = zip((r.scales[k] for r in results), before.leaves, strict=True)
                after = [kept if new is None else new for new, kept in pairs]
                trees[scale_name(slot)] = before.replaced(after)
        if self.remainders is not None:
            pairs = zip(results, self.remainders.leaves, strict=True)
            after = [x if r.remainder is None else r.remainder for r, x in pairs]
            trees[REMAINDER] = self.remainders.replaced(after)
        return trees


def check_gradients(
    grads: Leaves, params: Leaves | None, state: StateLeaves, records: Sequence[Storage]
) -> None:
    """Raise ValueError where gradients, parameters and state do not fit together."""
    for moments in state.codes[:1]:
        _check_paths("gradients", grads, moments)
        if params is not None:
            _check_paths("params", params, moments)
    if params is not None:
        _check_paths("gradients", grads, params)
    for i, path in enumerate(grads.paths):
        g, record = grads.leaves[i], records[i]
        for moments in state.codes[:1]:
            got, like = jnp.shape(moments.leaves[i]), record.codes(0).shape
            got = unfolded(got) if len(got) > len(record.shape) else got
            # Who passes the wrong gradient or parameter, not the wrong state.
            if got != like and record.slots[0].shape is None and not record.packed:
                what = "gradient" if params is None else "parameter"
                _check(False, path, what, record.shape, got)
        _check(
            jnp.shape(g) == record.shape, path, "gradient", jnp.shape(g), record.shape
        )
        if params is None:
            continue
        kinds = [_kind(x) for x in (g, params.leaves[i])]
        _check(
            kinds[0] == kinds[1] or kinds[1] is None,
            path,
            "gradient type",
            jnp.result_type(g),
            f"a type like the parameter's, {jnp.result_type(params.leaves[i])}",
        )


def _kind(x: Any) -> Any:
    kinds = (jnp.floating, jnp.complexfloating)
    return next((k for k in kinds if jnp.issubdtype(jnp.result_type(x), k)), None)


def _check(fits: bool, path: str, what: str, got: Any, expected: Any) -> None:
    if not fits:
        raise ValueError(
            f"{path!r}: {what} {got}, but this optimizer expected {expected}. "
            "The state belongs to other parameters or another configuration."
        )


def _check_keys(where: str, got: Any, expected: Any) -> None:
    if set(got) != set(expected):
        raise ValueError(
            f"{where} has {sorted(got)}, but this optimizer expected "
            f"{sorted(expected)}: it was made by another optimizer or with other "
            "options. Use the same options, or a fresh tx.init(params)."
        )


def _check_paths(what: str, got: Leaves, expected: Leaves) -> None:
    for mine, other in zip_longest(got.paths, expected.paths):
        if mine != other:
            raise ValueError(
                f"the tree of {what} does not fit the state: first difference at "
                f"{mine!r}, where the state has {other!r} (None: nothing). "
                "Call tx.init with parameters of the same tree."
            )
