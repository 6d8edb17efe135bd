"""Optimizers for JAX whose state is 8-bit and whose step is one fused kernel."""

import importlib
from typing import TYPE_CHECKING, Any

from .accumulate import Accumulated as Accumulated
from .accumulate import AccumulateState as AccumulateState
from .accumulate import accumulate as accumulate
from .adagrad import adagrad as adagrad
from .adam import adam as adam
from .adam import adamw as adamw
from .adamax import adamax as adamax
from .ademamix import ademamix as ademamix
from .aliases import *  # noqa: F403
from .convert import dequantize as dequantize
from .convert import requantize as requantize
from .explain import Explanation as Explanation
from .explain import ExplanationRow as ExplanationRow
from .explain import explain as explain
from .integrations.bitsandbytes import from_bitsandbytes as from_bitsandbytes
from .lamb import lamb as lamb
from .lars import lars as lars
from .lion import lion as lion
from .masters import from_masters as from_masters
from .masters import masters as masters
from .muon import muon as muon
from .optax_states import from_optax as from_optax
from .optax_states import to_optax as to_optax
from .options import Options as Options
from .presets import PRESETS as PRESETS
from .presets import Preset as Preset
from .presets import preset as preset
from .reports import MemoryReport as MemoryReport
from .reports import memory_report as memory_report
from .rmsprop import rmsprop as rmsprop
from .sgd import sgd as sgd
from .sharding.states import state_sharding as state_sharding
from .spelling import absent as _absent
from .stepping.norms import LayerNorms as LayerNorms
from .stepping.norms import last_norms as last_norms
from .stepping.transformation import Transformation as Transformation
from .stepping.transformation import step as step
from .storage.muon import MuonState as MuonState
from .storage.quantized import QuantizedState as QuantizedState
from .storage.state import State as State
from .values import embeddings_in_32bit as embeddings_in_32bit
from .wrapping.transformation import quantized as quantized

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

if not TYPE_CHECKING:  # or type checkers would take any name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _LATE:
            raise AttributeError(_absent(__name__, name, __dir__()))
        module = importlib.import_module(_LATE[name])
        return module if name.islower() else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
