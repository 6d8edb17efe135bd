"""Optimizers for JAX whose state is 8-bit and whose step is one fused kernel."""

from .adam import adam as adam
from .adam import adamw as adamw
from .flax import TrainState as TrainState
from .flax import step as step
from .fused import Transformation as Transformation
from .names import adam8bit as adam8bit
from .names import adam32bit as adam32bit
from .names import adamw8bit as adamw8bit
from .names import adamw32bit as adamw32bit
from .options import Options as Options
from .report import MemoryReport as MemoryReport
from .report import memory_report as memory_report
from .state import State as State
