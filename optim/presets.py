"""Published implementations of LAMB and LARS, by name."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .adam import adamw
from .correction import bias_correction
from .lamb import lamb
from .lars import lars
from .sgd import sgd
from .spelling import Callee, translated
from .stepping.transformation import Transformation


@dataclass(frozen=True)
class Preset:
    """An optimizer and the arguments with which it is a published one.

    Attributes:
      optimizer: of this library.
      arguments: where they differ from its defaults.
      source: the paper or the program.
      rewrite: from the arguments of a call, with the learning rate, to those of the
        optimizer, where the source needs more than defaults.
    """

    optimizer: Callable[..., Transformation]
    arguments: Mapping[str, Any]
    source: str
    rewrite: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda x: x)


def _adapt_what_decays(arguments: dict[str, Any]) -> dict[str, Any]:
    """Leaves that are excluded from weight decay have no ratio, unless it is said."""
    mask = arguments.get("mask")
    return {"adapt_mask": True if mask is None else mask} | arguments


def _correct_the_rate(arguments: dict[str, Any]) -> dict[str, Any]:
    """The bias correction multiplies the whole step, and so weight decay and eps."""
    rate = arguments["learning_rate"]
    b1, b2 = arguments.get("b1", 0.9), arguments.get("b2", 0.999)

    def corrected(count: jax.Array) -> jax.Array:
        t = jnp.asarray(count + 1, jnp.float32)
        c1, c2 = (bias_correction(jnp.float32(b), t) for b in (b1, b2))
        now = jnp.asarray(rate(count) if callable(rate) else rate, jnp.float32)
        return now * jnp.sqrt(c2) / c1

    return arguments | {"learning_rate": corrected}


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "lamb-paper": Preset(
            lamb, {"adapt_mask": True, "weight_decay": 0.01}, "arXiv 1904.00962 v5"
        ),
        "lamb-tf-addons": Preset(lamb, {}, "TensorFlow Addons", _adapt_what_decays),
        "lamb-nvidia": Preset(
            lamb,
            {"adapt_mask": True, "weight_decay": 0.01, "grad_clip_norm": 1.0},
            "NVIDIA Apex FusedLAMB, use_nvlamb=True",
        ),
        "lamb-deepspeed": Preset(
            lamb,
            {
                "adapt_mask": True,
                "eps": 1e-8,
                "ratio_bounds": (0.01, 10.0),
                "bias_correction": False,
            },
            "DeepSpeed 0.19 FusedLamb",
            _correct_the_rate,
        ),
        "lamb-optax": Preset(lamb, {"adapt_mask": True}, "optax.lamb"),
        "lamb-braintools": Preset(lamb, {"adapt_mask": True}, "braintools 0.3 Lamb"),
        "lamb-bitsandbytes": Preset(
            adamw, {"weight_decay": 0.0, "max_unorm": 1.0}, "bitsandbytes 0.50 LAMB"
        ),
        "lars-paper": Preset(
            lars,
            {"adapt_mask": True, "weight_decay": 5e-4, "decay_norm": "apart"},
            "arXiv 1708.03888",
        ),
        "lars-optax": Preset(lars, {"adapt_mask": True}, "optax.lars"),
        "lars-braintools": Preset(
            lars,
            {"adapt_mask": True, "eps": 1e-8, "learning_rate_first": False},
            "braintools 0.3 Lars",
        ),
        "lars-bitsandbytes": Preset(
            sgd, {"momentum": 0.9, "max_unorm": 0.02}, "bitsandbytes 0.50 LARS"
        ),
    }
)


def preset(
    name: str, learning_rate: optax.ScalarOrSchedule, **arguments: Any
) -> Transformation:
    """A published LAMB or LARS, with 8-bit state.

    `docs/large_batch.md` has a table of what each does.

    Args:
      name: a key of `octavo.optim.PRESETS`, for example "lamb-nvidia".
      learning_rate: number or schedule.
      **arguments: of the optimizer behind it (`lamb`, `lars`, `adamw` or `sgd`) and its
        options; they override the preset's.

    Raises:
      ValueError: for a name that does not exist.

    >>> from octavo import optim
    >>> tx = optim.preset("lamb-nvidia", 6e-3, weight_decay=0.1, state="32bit")
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    function = chosen.optimizer
    callee = Callee("preset", function.__name__, inspect.signature(function))
    own = translated(callee, (), {"learning_rate": learning_rate, **arguments})
    return function(**chosen.rewrite({**chosen.arguments, **own}))
