"""Optimizers for JAX whose state is 8-bit and whose step is one fused kernel."""

from .adam import adam as adam
from .adam import adamw as adamw
from .flax import TrainState as TrainState
from .flax import step as step
from .fused import Transformation as Transformation
from .lamb import lamb as lamb
from .lars import lars as lars
from .names import adam8bit as adam8bit
from .names import adam32bit as adam32bit
from .names import adamw8bit as adamw8bit
from .names import adamw32bit as adamw32bit
from .names import lamb8bit as lamb8bit
from .names import lamb32bit as lamb32bit
from .names import lars8bit as lars8bit
from .names import lars32bit as lars32bit
from .norms import LayerNorms as LayerNorms
from .norms import last_norms as last_norms
from .options import Options as Options
from .presets import PRESETS as PRESETS
from .presets import Preset as Preset
from .presets import preset as preset
from .report import MemoryReport as MemoryReport
from .report import memory_report as memory_report
from .state import State as State
