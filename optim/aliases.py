"""The names that people bring from bitsandbytes: an optimizer with its state fixed."""

from collections.abc import Callable
from functools import partial, update_wrapper

from .adam import adam, adamw
from .lamb import lamb
from .lars import lars
from .stepping.transformation import Transformation


def _stored(
    optimizer: Callable[..., Transformation], name: str, state: str
) -> Callable[..., Transformation]:
    named = update_wrapper(partial(optimizer, state=state), optimizer)
    named.__name__ = named.__qualname__ = name  # type: ignore[attr-defined]
    return named


adam8bit = _stored(adam, "adam8bit", "8bit")
adam32bit = _stored(adam, "adam32bit", "32bit")
adamw8bit = _stored(adamw, "adamw8bit", "8bit")
adamw32bit = _stored(adamw, "adamw32bit", "32bit")
lamb8bit = _stored(lamb, "lamb8bit", "8bit")
lamb32bit = _stored(lamb, "lamb32bit", "32bit")
lars8bit = _stored(lars, "lars8bit", "8bit")
lars32bit = _stored(lars, "lars32bit", "32bit")
