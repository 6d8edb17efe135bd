"""Fused steps of quantized optimizers: one definition, three backends."""

from .backends import BACKENDS as BACKENDS
from .backends import PLATFORMS as PLATFORMS
from .backends import Choice as Choice
from .backends import choose as choose
from .backends import run as run
from .backends import run_all as run_all
from .formats import FORMATS as FORMATS
from .formats import Float32 as Float32
from .formats import Format as Format
from .formats import numbered as numbered
from .layout import Blocks as Blocks
from .layout import blocks_of as blocks_of
from .program import Leaf as Leaf
from .program import Noise as Noise
from .program import Program as Program
from .program import Scalars as Scalars
from .program import Sum as Sum
from .rounding import leaf_number as leaf_number
from .rounding import step_key as step_key
from .rule import Norms as Norms
from .rule import Rule as Rule
from .rule import Slot as Slot
from .storage import Storage as Storage
from .storage import StoredSlot as StoredSlot
from .storage import nbytes as nbytes
