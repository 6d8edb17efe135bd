"""What `init` and `update` of a quantized transformation do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from octavo.pallas_kernels import Leaf, Storage, step_key

from ..checks import is_traced
from ..convert import FROM_OPTAX, TO_OPTAX
from ..options import Settings
from ..sharding.placement import everywhere, filled, placements
from ..storage.quantized import QuantizedState
from ..storage.state import StateLeaves, scale_name, state_class
from ..storage.table import table_of
from ..storage.tree import Leaves
from .coding import Stored
from .parts import Part, like_parameter, part_of, rows_of
from .passes import decode, encode
from .structure import Structure


@dataclass(frozen=True, eq=False)
class Wrapper:
    """Another transformation, and how its moments are stored."""

    inner: optax.GradientTransformationExtraArgs
    structure: Structure
    state: Any
    settings: Settings
    _planned: dict[Any, dict[str, Part]] = field(default_factory=dict, init=False)

    def init(self, params: Any) -> QuantizedState:
        """The other transformation's fresh state, stored."""
        tree = Leaves.of(params)
        moments, rest = self.structure.split(self.inner.init(params))
        parts = self._parts(tree, moments)
        given = placements(self.settings.sharding, tree)
        where = dict(zip(tree.paths, given, strict=True))
        leaves = dict(zip(tree.paths, tree.leaves, strict=True))
        empty = {
            key: [
                _zeros(record, leaves[path], where[path])
                for path, record in zip(part.paths, part.records, strict=True)
            ]
            for key, part in parts.items()
        }
        stored = _encoded(parts, where, empty, moments, None)
        states = {}
        for key, part in parts.items():
            small = jnp.zeros((), jnp.int32), table_of(part.records, len(part.slots))
            count, table = (everywhere(x, tree.leaves, given) for x in small)
            pairs = zip(stored[key], empty[key], strict=True)
            trees = _trees(part, [jax.tree.map(_placed, *pair) for pair in pairs])
            made = {"count": count, **trees, "extra": {"format": {part.tag: table}}}
            states[key] = state_class(part.fields)(**made)  # type: ignore[call-arg]
        return QuantizedState(states, rest)

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, QuantizedState]:
        """As in optax: the other transformation's update, of decoded moments."""
        parts, where = self._planned_for(updates if params is None else params)
        flat = _checked(parts, state)
        old = _stored(parts, flat)
        inner = self.structure.joined(_decoded(parts, where, old), state.rest)
        updates, inner = self.inner.update(updates, inner, params, **extra_args)
        moments, rest = self.structure.split(inner)
        counts = {key: x.count for key, x in state.moments.items()}
        step = step_key(self.settings.seed, counts[next(iter(parts))])
        stored = _encoded(parts, where, old, moments, step)
        states = {
            key: state.moments[key]._replace(
                count=jnp.asarray(optax.safe_increment(counts[key])),
                **flat[key].replaced(
                    state.moments[key], [Leaf(None, None, *x) for x in stored[key]]
                ),
            )
            for key in parts
        }
        return updates, QuantizedState(states, rest)

    def inner_state(self, state: Any, params: Any) -> Any:
        """The other transformation's own state."""
        parts, where = self._planned_for(params)
        old = _stored(parts, _checked(parts, state))
        moments = _decoded(parts, where, old)
        return self.structure.joined(moments, state.rest)

    def _planned_for(
        self, params: Any
    ) -> tuple[dict[str, Part], dict[str, NamedSharding | None]]:
        """Parts, planned once for each tree of parameters, and shardings."""
        tree = Leaves.of(params)
        forms = ((jnp.shape(x), jnp.result_type(x)) for x in tree.leaves)
        key = tree.paths, tuple(forms)
        if key not in self._planned:
            moments, _ = self.structure.split(jax.eval_shape(self.inner.init, params))
            self._planned[key] = self._parts(tree, moments)
        given = placements(self.settings.sharding, tree)
        return self._planned[key], dict(zip(tree.paths, given, strict=True))

    def _parts(self, tree: Leaves, moments: Mapping[str, Any]) -> dict[str, Part]:
        return {
            key: part_of(key, found, self.state, self.settings, tree, moments[key])
            for key, found in self.structure.parts.items()
        }


def _zeros(record: Storage, leaf: Any, sharding: NamedSharding | None) -> Stored:
    """What is stored of a leaf before there is anything, where the parameter is."""
    codes, scales = [], []
    for k, slot in enumerate(record.slots):
        home = leaf if slot.shape is None else None
        where = sharding if slot.shape is None else None
        codes.append(filled(record.codes(k), 0, home, where))
        scales.append(filled(record.scales(k), 0, leaf, sharding))
    return Stored(tuple(codes), tuple(scales))


def _placed(new: jax.Array, old: jax.Array) -> jax.Array:
    """An array where another is, outside of jit."""
    return new if is_traced(new) else jax.device_put(new, old.sharding)


def _checked(parts: Mapping[str, Part], state: Any) -> dict[str, StateLeaves]:
    """The trees of a state, flat, if they are what is expected."""
    if not isinstance(state, QuantizedState):
        raise ValueError(
            f"the state is a {type(state).__name__}, not that of optim.quantized: pass "
            "what tx.init or the last update returned; optim.from_optax converts"
        )
    if set(state.moments) != set(parts):
        raise ValueError(
            f"state.moments has {sorted(state.moments)}, but this transformation "
            f"expected {sorted(parts)}: the state belongs to another one"
        )
    return {
        key: StateLeaves.of(state.moments[key], part.fields, part.tag, {"format"})
        for key, part in parts.items()
    }


def _stored(
    parts: Mapping[str, Part], flat: Mapping[str, StateLeaves]
) -> dict[str, list[Stored]]:
    """The arrays of a state leaf by leaf, checked."""
    found = {}
    for key, part in parts.items():
        rows = enumerate(zip(part.paths, part.records, strict=True))
        args = ((i, path, record, None, None) for i, (path, record) in rows)
        leaves = [flat[key].leaf(*x) for x in args]
        found[key] = [Stored(leaf.codes, leaf.scales) for leaf in leaves]
    return found


def _decoded(
    parts: Mapping[str, Part],
    where: Mapping[str, Any],
    stored: Mapping[str, list[Stored]],
) -> dict[str, dict[str, Any]]:
    """Moments as the other transformation has them, in its own types."""
    rows = rows_of(parts, where)
    given = [_some(stored[row.key][row.leaf], row.like) for row in rows]
    found = decode([row.task for row in rows], given)
    moments = {
        (row.key, row.leaf, k): x
        for row, xs in zip(rows, found, strict=True)
        for k, x in zip(row.like, xs, strict=True)
    }
    trees: dict[str, dict[str, Any]] = {}
    for key, part in parts.items():
        trees[key] = {}
        for k, slot in enumerate(part.slots):
            tree, leaves = part.trees[slot.name], []
            for i, like in enumerate(tree.leaves):
                own: Any = stored[key][i].codes[k]
                if (key, i, k) in moments:
                    own = TO_OPTAX[slot.in_optax](moments[key, i, k])
                leaves.append(own.astype(like.dtype))
            trees[key][slot.name] = tree.replaced(leaves)
    return trees


def _encoded(
    parts: Mapping[str, Part],
    where: Mapping[str, Any],
    old: Mapping[str, list[Stored]],
    moments: Mapping[str, Mapping[str, Any]],
    step: jax.Array | None,
) -> dict[str, list[Stored]]:
    """What is stored of moments; without a step, rounded to the nearest."""
    flat = {
        key: [Leaves.of(moments[key][slot.name]).leaves for slot in part.slots]
        for key, part in parts.items()
    }
    rows = rows_of(parts, where)
    given = [
        tuple(
            FROM_OPTAX[parts[row.key].slots[k].in_optax](
                _wide(flat[row.key][k][row.leaf])
            )
            for k in row.like
        )
        for row in rows
    ]
    before = [_some(old[row.key][row.leaf], row.like) for row in rows]
    tasks, numbers = [row.task for row in rows], [row.number for row in rows]
    made = encode(tasks, numbers, before, given, step)
    new = {(row.key, row.leaf): x for row, x in zip(rows, made, strict=True)}
    return {
        key: [
            _with(record, new.get((key, i)), [x[i] for x in flat[key]], old[key][i])
            for i, record in enumerate(part.records)
        ]
        for key, part in parts.items()
    }


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _some(stored: Stored, slots: tuple[int, ...]) -> Stored:
    codes, scales = stored
    return Stored(tuple(codes[k] for k in slots), tuple(scales[k] for k in slots))


def _with(
    record: Storage, new: Stored | None, moments: list[jax.Array], old: Stored
) -> Stored:
    """All slots of a leaf; those of another shape are stored as they are."""
    like = like_parameter(record)
    codes = [x.astype(s.dtype) for x, s in zip(moments, record.slots, strict=True)]
    scales = list(old.scales)
    for n, k in enumerate(like):
        assert new is not None
        codes[k] = new.codes[n]
        scales[k] = old.scales[k] if new.scales[n] is None else new.scales[n]
    return Stored(tuple(codes), tuple(scales))


def _trees(part: Part, stored: list[Stored]) -> dict[str, Any]:
    """The fields of a State that are trees."""
    trees = {}
    for k, slot in enumerate(part.slots):
        tree, name = part.trees[slot.name], scale_name(slot.name)
        trees[slot.name] = tree.replaced([x.codes[k] for x in stored])
        if name in part.fields:
            trees[name] = tree.replaced([x.scales[k] for x in stored])
    return trees
