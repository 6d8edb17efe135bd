"""Fused steps of quantized optimizers: one definition, three backends."""

from .backends import BACKENDS as BACKENDS
from .backends import choose as choose
from .backends import leaf_step as leaf_step
from .backends import leaf_sums as leaf_sums
from .formats import FORMATS as FORMATS
from .formats import NUMBERS as NUMBERS
from .formats import Float32 as Float32
from .formats import Format as Format
from .formats import numbered as numbered
from .layout import Blocks as Blocks
from .layout import blocks_of as blocks_of
from .leaf import decode_leaf as decode_leaf
from .leaf import encode_leaf as encode_leaf
from .norms import Sum as Sum
from .rounding import Noise as Noise
from .rounding import key as key
from .rule import Decay as Decay
from .rule import Norms as Norms
from .rule import Rule as Rule
from .rule import Slot as Slot
from .step import Leaf as Leaf
from .step import Program as Program
from .step import Scalars as Scalars
from .step import tile_step as tile_step
