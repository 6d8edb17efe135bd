"""What becomes of one array between its file and its place in a target."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from octavo.pallas_kernels import Storage

from ..convert import FROM_OPTAX, automatic, decoded, encoded
from ..sharding.geometry import fitting, of_parameter, of_state
from ..storage.memory import on_device
from .checksum import is_key
from .description import form


class Move(NamedTuple):
    """One array of the target: the saved arrays that it takes, and what it makes."""

    reads: tuple[str, ...]
    make: Callable[..., Any]


def typed(x: Any, like: Any) -> Any:
    """An array of the type of another; keys from their data."""
    if not is_key(like):
        data, dtype = jax.random.key_data(x) if is_key(x) else x, form(like)[1]
        return data if data.dtype == dtype else on_device(data).astype(dtype)
    if is_key(x):
        return x
    impl = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(jnp.asarray(x), impl=impl)


def fresh(record: Storage, slot: int, like: tuple[Any, Any]) -> tuple[jax.Array, ...]:
    """A moment that starts anew, with its scales, if any."""
    made = zip(like, record.initial(slot), strict=True)
    return tuple(jnp.full(x.shape, v, x.dtype) for x, v in made if x is not None)


class Conversion(NamedTuple):
    """A moment as another state stores it.

    Args:
      was: how its leaf was stored.
      how: how it is to be stored.
      slot: its number.
      like: its codes and scales, if any, in the target.
      of_optax: whether the checkpoint has what optax keeps; see `Slot.in_optax`.
      scaled: whether the checkpoint has scales of it.
      other: number of the slot to which it is or was relative; None: there is none.
    """

    was: Storage
    how: Storage
    slot: int
    like: tuple[Any, Any]
    of_optax: bool
    scaled: bool
    other: int | None

    def __call__(self, *saved: jax.Array) -> tuple[jax.Array, ...]:
        """From codes and scales, of the moment and then of the other slot."""
        was, how, k = self.was, self.how, self.slot

        def moment_of(slot: int, pair: tuple[Any, Any], reference: Any) -> jax.Array:
            moment = decoded(was, slot, *pair, reference)
            kind = how.slots[slot].in_optax if self.of_optax else "same"
            return FROM_OPTAX[kind](moment)

        own, others = saved[: 1 + self.scaled], saved[1 + self.scaled :]
        reference = None
        if self.other is not None:
            reference = moment_of(self.other, _pair(others), None)

        def of(record: Storage) -> Any:
            return None if record.slots[k].reference is None else reference

        moment = moment_of(k, _pair(own), of(was))
        new, wide = encoded(how, k, moment, self.like[0], of(how))
        if self.like[1] is None:
            return (new,)
        return new, fresh(how, k, self.like)[1] if wide is None else wide


def _pair(arrays: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """Codes, and scales or None."""
    return arrays[0], arrays[1] if len(arrays) > 1 else None


def shown(how: Storage, slot: int, codes: Any) -> str:
    """How a moment is stored, for errors."""
    name, blocks = how.formats[slot].name, how.blocks
    if not how.formats[slot].quantized:
        return f"{name} ({np.dtype(codes.dtype)})"
    return f"{name} in blocks of {blocks.size} along axis {blocks.axis}"


def loaded_as(sharding: Any, shape: tuple[int, ...], rank: int | None = None) -> Any:
    """Where to load an array that becomes one with this sharding, and of this rank."""
    if isinstance(sharding, NamedSharding) and rank is not None:
        sharding = of_state(sharding, shape, rank)
        if len(shape) == rank - 1:
            sharding = of_parameter(sharding, rank)
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) > len(shape):
        single = sharding is not None and len(sharding.device_set) == 1
        return sharding if single else None
    free = fitting(automatic(sharding), shape)
    kind = sharding.memory_kind
    return free if kind is None else free.with_memory_kind(kind)
