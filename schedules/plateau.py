"""A learning rate that falls when a metric stops improving."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .domains import Choice, Count, Length, Rate, Real, check_fields
from .shapes import ratio

_INF = float("inf")


class PlateauState(NamedTuple):
    """Where a plateau search stands; arrays of shape ()."""

    lr: jax.Array  # f32
    best: jax.Array  # f32, the best reading so far
    bad: jax.Array  # int32, readings since then
    cooldown: jax.Array  # int32, readings still to be ignored
    total: jax.Array  # f32, sum of the values of the reading under way
    seen: jax.Array  # int32, how many there are


@dataclass(frozen=True)
class _Plateau:
    """The options, checked, and the state machine of torch."""

    base_lr: Annotated[float, Real(open_low=True)]
    mode: Annotated[str, Choice(("min", "max"))]
    factor: Annotated[float, Real(high=1.0)]
    patience: Count
    threshold: Rate
    threshold_mode: Annotated[str, Choice(("rel", "abs"))]
    cooldown: Count
    min_lr: Rate
    eps: Rate
    accumulation_size: Length

    def __post_init__(self) -> None:
        check_fields(self, "ReduceLROnPlateau")
        if self.factor == 1.0:
            raise ValueError("ReduceLROnPlateau: factor=1.0 must be below 1")

    def init(self, params: optax.Params) -> PlateauState:
        del params
        worst = _INF if self.mode == "min" else -_INF
        return PlateauState(
            lr=jnp.asarray(self.base_lr, jnp.float32),
            best=jnp.asarray(worst, jnp.float32),
            bad=jnp.zeros((), jnp.int32),
            cooldown=jnp.zeros((), jnp.int32),
            total=jnp.zeros((), jnp.float32),
            seen=jnp.zeros((), jnp.int32),
        )

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PlateauState]:
        del params, extra_args
        state = self._collect(state, _as_scalar(value))
        scale = ratio(state.lr, self.base_lr)
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    def _collect(self, state: PlateauState, value: jax.Array) -> PlateauState:
        """Adds a value, and reads the mean once there are enough."""
        total, seen = state.total + value, state.seen + 1
        full = seen == self.accumulation_size
        read = self._read(state, total / seen.astype(jnp.float32))
        read = read._replace(total=jnp.zeros_like(total), seen=jnp.zeros_like(seen))
        waiting = state._replace(total=total, seen=seen)
        return jax.tree.map(lambda a, b: jnp.where(full, a, b), read, waiting)

    def _read(self, state: PlateauState, metric: jax.Array) -> PlateauState:
        better = self._better(metric, state.best)
        cooling = state.cooldown > 0
        bad = jnp.where(better | cooling, 0, state.bad + 1)
        reduce = bad > self.patience
        lower = jnp.maximum(state.lr * self.factor, self.min_lr)
        # torch leaves the rate alone where the change would be below eps.
        moved = reduce & (state.lr - lower > self.eps)
        rest = jnp.where(cooling, state.cooldown - 1, state.cooldown)
        return state._replace(
            lr=jnp.where(moved, lower, state.lr),
            best=jnp.where(better, metric, state.best),
            bad=jnp.where(reduce, 0, bad),
            cooldown=jnp.where(reduce, self.cooldown, rest),
        )

    def _better(self, metric: jax.Array, best: jax.Array) -> jax.Array:
        sign = -1.0 if self.mode == "min" else 1.0
        if self.threshold_mode == "rel":
            mark = best * (1.0 + sign * self.threshold)
        else:
            mark = best + sign * self.threshold
        return metric < mark if self.mode == "min" else metric > mark


def ReduceLROnPlateau(
    base_lr: float = 1.0,
    mode: Literal["min", "max"] = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
    accumulation_size: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the learning rate by ``factor`` when a metric stops improving.

    Goes after an optimizer, and reads ``value=`` of ``update``. The rules are
    torch's: a reading is better if it beats the best one by the threshold; after
    more than ``patience`` worse ones in a row the rate falls, and ``cooldown``
    readings are not counted. The new rate holds from the same update on. The state
    is six scalars (24 bytes), whatever the size of the parameters.

    Args:
        base_lr: learning rate of the optimizer before it, above 0. The updates are
            multiplied by the current rate over this one.
        mode: "min" for losses, "max" for accuracies.
        factor: of each fall, 0 to below 1.
        patience: worse readings to let pass.
        threshold: least improvement that counts, 0 or more.
        threshold_mode: "rel" for a share of the best reading, "abs" for a distance.
        cooldown: readings to ignore after a fall.
        min_lr: rate to stop at, in units of ``base_lr``.
        eps: smallest change of the rate worth making, in the same units.
        accumulation_size: values averaged into one reading, at least 1; more than 1
            for the loss of each minibatch, where torch's users call it per epoch.

    Raises:
        ValueError: an option out of its range; in ``update``, a ``value`` that is
            not there or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from octavo import schedules
        >>> plateau = schedules.ReduceLROnPlateau(base_lr=0.5, patience=1)
        >>> tx = optax.chain(optax.sgd(0.5), plateau)
        >>> params = jnp.ones(2)
        >>> state = tx.init(params)
        >>> for loss in (1.0, 1.0, 1.0):
        ...     updates, state = tx.update(jnp.ones(2), state, params, value=loss)
        >>> round(float(updates[0]), 4)
        -0.05
    """
    plateau = _Plateau(
        base_lr=base_lr,
        mode=mode,
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        min_lr=min_lr,
        eps=eps,
        accumulation_size=accumulation_size,
    )
    return optax.GradientTransformationExtraArgs(plateau.init, plateau.update)


def _as_scalar(value: jax.typing.ArrayLike | None) -> jax.Array:
    if value is None:
        raise ValueError(
            "ReduceLROnPlateau reads a metric: write tx.update(grads, state, params, "
            "value=loss)"
        )
    metric = jnp.asarray(value).astype(jnp.float32)
    if metric.shape != ():
        raise ValueError(
            f"ReduceLROnPlateau: value has shape {metric.shape}, and must be one "
            "number; write value=loss.mean()"
        )
    return metric
