"""Learning rates as functions of the step, for optax and everything that takes it.

Schedules are frozen dataclasses without state, named and parametrized as in torch
where torch has them: call one with a step, or give it to an optimizer. The one that
has state, ``ReduceLROnPlateau``, is an optax transformation.
"""

from .base import Schedule as Schedule
from .compose import SWALR as SWALR
from .compose import ChainedLR as ChainedLR
from .compose import SequentialLR as SequentialLR
from .cosine import CosineAnnealingLR as CosineAnnealingLR
from .cosine import CosineAnnealingWarmRestarts as CosineAnnealingWarmRestarts
from .cyclic import CyclicLR as CyclicLR
from .cyclic import OneCycleLR as OneCycleLR
from .exponential import ExponentialDecayLR as ExponentialDecayLR
from .exponential import ExponentialLR as ExponentialLR
from .parse import parse as parse
from .plateau import PlateauState as PlateauState
from .plateau import ReduceLROnPlateau as ReduceLROnPlateau
from .plot import plot as plot
from .plot import sparkline as sparkline
from .polynomial import LinearLR as LinearLR
from .polynomial import PolynomialLR as PolynomialLR
from .scaling import scale_lr as scale_lr
from .steps import ConstantLR as ConstantLR
from .steps import MultiplicativeLR as MultiplicativeLR
from .steps import MultiStepLR as MultiStepLR
from .steps import PiecewiseConstantLR as PiecewiseConstantLR
from .steps import StepLR as StepLR
from .warmup import InverseSqrtLR as InverseSqrtLR
from .warmup import WarmupCosineLR as WarmupCosineLR
from .warmup import WarmupLR as WarmupLR
from .warmup import WarmupStableDecayLR as WarmupStableDecayLR
