"""Optimizers for JAX whose state is 8-bit and whose step is one fused kernel."""

import importlib
from typing import TYPE_CHECKING, Any

from .adam import adam as adam
from .adam import adamw as adamw
from .aliases import adam8bit as adam8bit
from .aliases import adam32bit as adam32bit
from .aliases import adamw8bit as adamw8bit
from .aliases import adamw32bit as adamw32bit
from .aliases import lamb8bit as lamb8bit
from .aliases import lamb32bit as lamb32bit
from .aliases import lars8bit as lars8bit
from .aliases import lars32bit as lars32bit
from .convert import dequantize as dequantize
from .convert import from_optax as from_optax
from .convert import requantize as requantize
from .convert import to_optax as to_optax
from .explain import Explanation as Explanation
from .explain import ExplanationRow as ExplanationRow
from .explain import explain as explain
from .lamb import lamb as lamb
from .lars import lars as lars
from .options import Options as Options
from .presets import PRESETS as PRESETS
from .presets import Preset as Preset
from .presets import preset as preset
from .reports import MemoryReport as MemoryReport
from .reports import memory_report as memory_report
from .sgd import sgd as sgd
from .sharding.placement import state_sharding as state_sharding
from .stepping.norms import LayerNorms as LayerNorms
from .stepping.norms import last_norms as last_norms
from .stepping.transformation import Transformation as Transformation
from .stepping.transformation import step as step
from .storage.state import State as State

if TYPE_CHECKING:
    from . import checkpoint as checkpoint
    from . import integrations as integrations
    from .integrations.flax import TrainState as TrainState

# What needs Orbax or Flax is imported when it is asked for.
_LATE = {
    "checkpoint": "octavo.optim.checkpoint",
    "integrations": "octavo.optim.integrations",
    "TrainState": "octavo.optim.integrations.flax",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LATE[name])
    return module if name.islower() else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
