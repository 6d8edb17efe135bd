"""What the functions of a transformation do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax

from octavo import pallas_kernels as kernels
from octavo.pallas_kernels import Program, Rule, Scalars, Storage

from ..options import Settings
from ..sharding.binding import check_boxes
from ..sharding.finer import Places, places
from ..sharding.hosting import hosted
from ..sharding.placement import committed, everywhere, filled
from ..storage.plan import check_remainders, plan, quantizes
from ..storage.state import (
    REMAINDER,
    State,
    StateLeaves,
    check_gradients,
    fields_of,
    scale_name,
    state_class,
)
from ..storage.table import table_of, tag_of
from ..storage.tree import BOOLS, NAMES, PAGED, Leaves, per_leaf, spread
from ..values import check_backend
from .begun import Begun
from .norms import HISTORY, no_norms, unlimited
from .numbers import numbers
from .operands import Step, operands
from .stepper import Stepper
from .tasks import Work, warn_of_crossing


@dataclass(frozen=True, eq=False)
class Optimizer(Stepper):
    """A rule with its hyperparameters and options: what `init` and steps do."""

    rule: Rule
    hyperparameters: Any
    learning_rate: optax.ScalarOrSchedule
    settings: Settings
    weight_decay: Any
    masks: dict[str, Any]
    whole: bool = True  # its trees are all parameters, no part of them
    _planned: dict[Any, list[Storage]] = field(default_factory=dict, init=False)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Of its states."""
        slots = self.rule.slots
        names = [slot.name for slot in slots]
        quantized = quantizes(self.settings, slots)
        return fields_of(names, quantized, self.settings.keeps_remainders)

    @cached_property
    def tag(self) -> str:
        """Of its states."""
        return tag_of(self.settings, self.rule.slots)

    def records(self, tree: Leaves) -> list[Storage]:
        """How each leaf is stored; planned once for each tree of paths and shapes."""
        forms = ((jnp.shape(x), jnp.result_type(x)) for x in tree.leaves)
        key = tree.names, tuple(forms)
        if key not in self._planned:
            if self.whole:
                check_remainders(self.settings, tree)
            self._planned[key] = plan(self.settings, self.rule.slots, tree)
        return self._planned[key]

    def places(self, tree: Leaves) -> Places:
        """Where each leaf is, and its state."""
        return places(self.settings.sharding, self.settings.state_sharding, tree)

    # ------------------------------------------------------------- for integrations

    @property
    def rate(self) -> Any:
        """The learning rate."""
        return self.learning_rate

    def with_rate(self, rate: Any) -> "Optimizer":
        """With another one."""
        return replace(self, learning_rate=rate)

    def each(self, change: Callable[["Optimizer"], "Optimizer"]) -> "Optimizer":
        """It has no other in it."""
        return change(self)

    # ---------------------------------------------------------------------- init

    def init(self, params: Any) -> State:
        """A fresh state, sharded like the parameters."""
        leaves = Leaves.of(params)
        records = self.records(leaves)
        check_boxes(params, records)
        places = self.places(leaves)
        records, pages = hosted(self.settings, leaves, records, places)
        where = places.state
        each = list(zip(records, leaves.leaves, where, pages, strict=True))
        trees = {}
        for k, slot in enumerate(self.rule.slots):
            codes, scales = [], []
            for record, p, sharding, paging in each:
                code, scale = record.initial(k)
                codes.append(filled(record.codes(k), code, p, sharding, paging.hosted))
                # What no step reads stays on the device.
                there = paging.hosted and record.formats[k].quantized
                scales.append((record.scales(k), scale, p, sharding, there))
            trees[slot.name] = leaves.replaced(codes)
            if scale_name(slot.name) in self.fields:
                full = [filled(*args) for args in scales]
                trees[scale_name(slot.name)] = leaves.replaced(full)
        if self.settings.keeps_remainders:
            kept = [
                filled(r.remainder, 0, p, s, r.has_remainder and paging.hosted)
                for r, p, s, paging in each
            ]
            trees[REMAINDER] = leaves.replaced(kept)
        small = (jnp.zeros((), jnp.int32), self._extra(records))
        count, extra = jax.tree.map(
            lambda x: everywhere(x, leaves.leaves, where), small
        )
        made = {"count": count, **trees, "extra": extra}
        state = state_class(self.fields)(**made)  # type: ignore[call-arg]
        return committed(state) if any(x.hosted for x in pages) else state

    def _extra(self, records: list[Storage]) -> dict[str, Any]:
        table = table_of(records, len(self.rule.slots))
        extra: dict[str, Any] = {"format": {self.tag: table}}
        settings = self.settings
        if settings.skip_nonfinite:
            extra["skipped"] = jnp.zeros((), jnp.int32)
        if settings.percentile_clipping is not None:
            extra["clip_history"] = jnp.zeros((len(records), HISTORY))
        if settings.record_norms:
            extra["norms"] = no_norms([record.blocks.layer_count for record in records])
        return extra

    def _extra_keys(self) -> set[str]:
        """Of `_extra`."""
        settings = self.settings
        options = {
            "skipped": settings.skip_nonfinite,
            "clip_history": settings.percentile_clipping is not None,
            "norms": settings.record_norms,
        }
        return {"format", *(name for name, on in options.items() if on)}

    # ---------------------------------------------------------------------- steps

    def _without_parameters(
        self, tree: Leaves, records: list[Storage]
    ) -> list[Storage]:
        """The records where it is not known what updates are added to."""
        if "auto" in per_leaf("paged", self.settings.paged, tree, PAGED):
            raise ValueError(
                "paged='auto' depends on the bytes of the parameters. Call "
                "tx.update(grads, state, params)"
            )
        asked = self.settings.weights is not None
        if asked and any(r.weights not in (None, "nearest") for r in records):
            raise ValueError(
                f"weights={self.settings.weights!r}: an update depends on what it is "
                "added to. Call tx.update(grads, state, params), or leave weights out"
            )
        return [replace(record, weights=None) for record in records]

    @property
    def needs_params(self) -> bool:
        """Whether updates depend on the parameters."""
        rule, settings = self.rule, self.settings
        measures = settings.max_unorm is not None or settings.record_norms
        return bool(rule.ratio or rule.decay or measures)

    def run(
        self, grads: Any, state: Any, params: Any, in_place: bool
    ) -> tuple[Any, Any]:
        """A step from its beginning to its end."""
        begun = self.begin(grads, state, params, in_place)
        h, step = self.hyperparameters, begun.step
        passed = operands(self.settings, h, step, state.extra, state.count)
        results = step._replace(scalars=passed.scalars).run()
        return begun.end(results, passed)

    def begin(self, grads: Any, state: Any, params: Any, in_place: bool) -> Begun:
        """What there is to do in a step, checked."""
        g = Leaves.of(grads)
        p = None if params is None else Leaves.of(params)
        old = StateLeaves.of(state, self.fields, self.tag, self._extra_keys())
        tree = p or g
        records = self.records(tree)
        if p is None:
            records = self._without_parameters(tree, records)
        check_gradients(g, p, old, records)
        where = self.places(tree)
        records, _ = hosted(self.settings, tree, records, where)
        leaves = [
            old.leaf(i, path, record, *_values(record, i, g, p))
            for i, (path, record) in enumerate(zip(tree.paths, records, strict=True))
        ]
        dtypes = [tuple(x.dtype for x in leaf[:2] if x is not None) for leaf in leaves]
        work = self.work(tree, params, records, where, dtypes, in_place)
        warn_of_crossing(work)
        scalars = self._scalars(tree, work, state.count)
        key = kernels.step_key(self.settings.seed, state.count)
        ids = [int(kernels.leaf_number(name)) for name in tree.names]
        step = Step(work, leaves, scalars, key, ids)
        return Begun(step, state, old, p if in_place and p else g, in_place)

    def work(
        self,
        tree: Leaves,
        params: Any,
        records: Sequence[Storage],
        where: Places,
        dtypes: Sequence[tuple[Any, ...]],
        in_place: bool,
        platform: str | None = None,
    ) -> list[Work]:
        """What a step has to do for each leaf: static, without its arrays."""
        records, pages = hosted(self.settings, tree, records, where, platform)
        rules = self._rules(records, params, tree)
        backends = per_leaf("backend", self.settings.backend, tree, NAMES)
        for path, backend in zip(tree.names, backends, strict=True):
            check_backend(backend, path)
        programs = (
            Program(rule, record, in_place)
            for rule, record in zip(rules, records, strict=True)
        )
        homes = (
            None if home == stepped else home
            for home, stepped in zip(*where, strict=True)
        )
        rows = (tree.names, programs, where.state, homes, dtypes, backends)
        known = [self.settings.sharding is not None] * len(records)
        return [Work(*row) for row in zip(*rows, known, pages, strict=True)]

    def _rules(
        self, records: Sequence[Storage], params: Any, tree: Leaves
    ) -> list[Rule]:
        """The rule of each leaf: with decay and ratio, or without."""
        decays, adapts = (
            _mask(name, mask, params, tree) for name, mask in self.masks.items()
        )
        if adapts is None:
            blocks = (record.blocks for record in records)
            adapts = [len(b.shape) - len(b.layers) >= 2 for b in blocks]
        rules = []
        for decay, adapt in zip(decays or [True] * len(records), adapts, strict=True):
            rule = self.rule if decay else replace(self.rule, decay=None)
            rule = rule if adapt else replace(rule, ratio=None)
            if self.settings.max_unorm is not None and rule.ratio is None:
                rule = replace(rule, ratio=unlimited)
            rules.append(rule)
        return rules

    def _scalars(
        self, tree: Leaves, work: Sequence[Work], count: jax.Array
    ) -> list[Scalars]:
        """What each leaf takes as operands, as far as the step's number says."""
        rate = self.learning_rate
        rate = jnp.asarray(rate(count) if callable(rate) else rate, jnp.float32)
        if rate.ndim:
            raise ValueError(
                f"learning_rate must be one number in each step, not {rate.shape}"
            )
        t = (count + 1).astype(jnp.float32)
        own = self.rule.scalars(t, rate, self.hyperparameters)
        factor = jnp.ones_like(rate) if self.rule.rate_first else rate
        factors = numbers("lr_scale", self.settings.lr_scale, tree, factor)
        decays: list[Any] = [None] * len(work)
        if self.rule.decay is not None:
            decays = numbers("weight_decay", self.weight_decay, tree)
        most = self.settings.grad_clip_value
        most = None if most is None else jnp.asarray(most, jnp.float32)
        rows = zip(work, factors, decays, strict=True)
        return [
            Scalars(factor, own, decay if w.program.rule.decay else None, None, most)
            for w, factor, decay in rows
        ]


def _values(record: Storage, i: int, g: Leaves, p: Leaves | None) -> tuple[Any, Any]:
    """Gradient and parameter of leaf i, as arrays."""
    gradient = jnp.asarray(g.leaves[i]) if record.steps else g.leaves[i]
    return gradient, None if p is None else jnp.asarray(p.leaves[i])


def _mask(name: str, mask: Any, params: Any, tree: Leaves) -> list[bool] | None:
    """For each leaf, what the mask says; None if there is no mask."""
    if mask is None:
        return None
    return spread(name, mask(params) if callable(mask) else mask, tree, BOOLS)
