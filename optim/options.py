"""Options that every optimizer takes, and the same once they are checked."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, TypeAlias, TypedDict, TypeVar, cast

import jax

from octavo.pallas_kernels import WEIGHTS, Slot

from .checks import (
    check_block_size,
    check_bool,
    check_int,
    check_not_negative,
    check_positive,
    check_shards,
    is_number,
)
from .spelling import Callee, translated
from .values import (
    StateFormat,
    check_backend,
    check_weights,
    formats_of,
    is_by_leaf,
    is_paged,
    is_state,
)

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])
# A tree like the parameters, or a prefix of one, has no type of its own.
PerLeaf: TypeAlias = _T | Callable[[str], _T] | Any


class Options(TypedDict, total=False):
    """Keyword options of every optimizer.

    Those marked "per leaf" may also be a tree of values like the parameters, a prefix
    of one, or a function of the leaf's path, `"encoder/kernel"`. Limits on gradients
    and steps may change without recompiling, as hyperparameters do.

    Attributes:
      state: how moments are stored, per leaf: `"8bit"` (default), `"dynamic8"`
        (bitsandbytes' code book), `"16bit"`, `"bf16"`, `"32bit"`; or one for each slot,
        `{"mu": "bf16", "nu": "8bit"}`.
      weights: how parameters of bfloat16 and float16 take steps that are smaller than
        their unit, per leaf; see `docs/weights.md`. `"stochastic"` (default): rounded
        up or down at random in proportion, which takes no memory. `"remainder8"`,
        `"remainder16"`: what rounding loses is kept in the state, in 1 or 2 bytes for
        each; with 2, that is training of float32 weights, bit for bit. `"nearest"`: as
        optax does it; small steps are lost. Nothing changes for float32.
      min_quantized_size: leaves with fewer values (in a layer, see `layer_axes`) keep
        32-bit state. Default 4096: they are norms and biases, sensitive and small. Of
        the global shape, whatever the mesh.
      block_size: values that share a scale, a positive multiple of 8, per leaf.
        Default 32, 2 bytes of scale for 32 codes: half the error of 256, and the height
        of an int8 tile on TPU. Of Muon's matrices 128.
      block_axis: the axis along which blocks run, per leaf. Default None: the longest
        one other than the last.
      min_shards: blocks fit into so many shards of the blocked axis, and into fewer,
        per leaf: 4096 rows over 256 devices are shards of 16 rows, with blocks of 16.
        Give the most that any mesh will have; then the numbers do not depend on the
        mesh at hand. Or the counts of mesh axes, `{"fsdp": 256, "tensor": 8}`, where
        `sharding` says which of them partition a leaf. Default 1: 32 rows and up have
        whole blocks. See `docs/sharding.md`.
      layer_axes: axes along which leaves stack layers, as scan over layers does: an
        int or a tuple of them, per leaf; None: the leaf is one layer. Each layer has
        norms and a ratio of its own, and no block spans two.
      lr_scale: factor of the learning rate, not negative, per leaf: for layer-wise
        decay of rates, or muP. An operand, like the rate itself; 0 leaves a leaf as it
        is, while its moments go on. Default 1.
      grad_clip_norm: scale all gradients so that their global norm is at most this.
      grad_clip_value: then clip each value of a gradient to at most this magnitude.
      percentile_clipping: int from 1 to 100: before both, scale the gradient of a leaf
        so that its norm is at most this percentile of its last 100 norms, the current
        one included, as in bitsandbytes before 0.50. There 5 was recommended; 100 (or
        None) does nothing.
      max_unorm: scale the step of a layer so that its norm, before the learning rate
        and decoupled decay, is at most max_unorm times its weights', as in
        bitsandbytes' LAMB (but weights that are all 0 set no limit).
      skip_nonfinite: if any gradient is NaN or infinite, leave parameters and state as
        they are, bit for bit, and count it in `state.extra["skipped"]`. Default False:
        only the blocks with such a value keep theirs.
      record_norms: keep the last step's norms and ratios in the state, for
        `octavo.optim.last_norms`. Optimizers with a trust ratio compute them anyway;
        others take a second pass over their state. Default False.
      sharding: of the parameters: a tree of `NamedSharding` like them, as
        `jax.tree.map(lambda p: p.sharding, params)` gives (or a prefix; or
        PartitionSpecs, within `jax.set_mesh`; or a function of the leaf's path, which
        may name what is known only when a step is traced). `tx.bind(params)` sets it.
        Default None: it is read off the types of the arrays where the mesh has explicit
        axes, as `jax.make_mesh` gives it; on several devices with other axes, the step
        is left to XLA.
      state_sharding: of the state, where it is partitioned further than the parameters
        (ZeRO-1): the mesh axis, or a tuple of them, over which it is partitioned, too,
        `"data"`; or shardings, as for `sharding`. Each device steps its part, and new
        parameters are gathered. Default None: like the parameters.
      paged: keep the state of large leaves (100,000 values and more) in the host's
        memory, and stream it through the device in each step, per leaf: True, False,
        or `"auto"`: of the largest ones, until parameters, gradients and state fit into
        `device_bytes`. The numbers are the same. Default False. See `docs/paged.md`.
      device_bytes: int, with `paged="auto"`: what parameters, gradients and state may
        take on each device; activations need more. Default: all the memory that the
        device reports.
      page_bytes: with `paged`, the most bytes of one chunk of a leaf on a device: of
        its gradient, parameter and state. A step has up to four at once. Default 64
        MiB.
      backend: `"xla"`, `"tpu"`, `"triton"` or `"mosaic_gpu"` (experimental: it is only
        used where it is named), per leaf. A kernel that is named and cannot take a
        quantized leaf is an error (but leaves whose blocks cross shards, of which a
        warning says what fits). Default None: the kernel of the device that JAX uses,
        and XLA for leaves that it does not take, and for those that are not quantized;
        `octavo.optim.explain` shows which.
      seed: int, of the unbiased rounding; the random numbers are a function of it, the
        step, and the position in the tree. Default 0.
    """

    state: PerLeaf[StateFormat]
    weights: PerLeaf[str]
    min_quantized_size: int
    block_size: PerLeaf[int]
    block_axis: PerLeaf[int | None]
    min_shards: PerLeaf[int]
    layer_axes: Any
    lr_scale: PerLeaf[float]
    grad_clip_norm: float | None
    grad_clip_value: float | None
    percentile_clipping: int | None
    max_unorm: float | None
    skip_nonfinite: bool
    record_norms: bool
    sharding: Any
    state_sharding: Any
    paged: PerLeaf[bool | str]
    device_bytes: int
    page_bytes: int
    backend: PerLeaf[str | None]
    seed: int


@dataclass(frozen=True)
class Settings:
    """Checked `Options`, with their defaults."""

    state: Any = "8bit"
    weights: PerLeaf[str | None] = None
    min_quantized_size: int = 4096
    block_size: PerLeaf[int | None] = None
    block_axis: PerLeaf[int | None] = None
    min_shards: PerLeaf[int] = 1
    layer_axes: Any = None
    lr_scale: PerLeaf[Any] = 1.0
    grad_clip_norm: Any = None
    grad_clip_value: Any = None
    percentile_clipping: int | None = None
    max_unorm: Any = None
    skip_nonfinite: bool = False
    record_norms: bool = False
    sharding: Any = None
    state_sharding: Any = None
    paged: PerLeaf[bool | str] = False
    device_bytes: int | None = None
    page_bytes: int = 64 * 2**20
    backend: PerLeaf[str | None] = None
    seed: int = 0

    @classmethod
    def of(cls, options: Options, slots: tuple[Slot, ...]) -> "Settings":
        """Check options.

        Raises:
          TypeError: for an option that does not exist.
          ValueError: for a value that is not allowed.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(
                    f"unknown option {name!r}; the options are {', '.join(known)}"
                )
        given = {name: value for name, value in options.items() if value is not None}
        settings = cls(**given)  # type: ignore[arg-type]
        if not is_by_leaf(settings.backend):
            check_backend(settings.backend)
        if not settings.state_by_leaf(slots):
            formats_of(settings.state, slots)
        if not is_by_leaf(settings.weights):
            check_weights(settings.weights)
        if settings.block_size is not None and not is_by_leaf(settings.block_size):
            check_block_size(settings.block_size, "")
        if not is_by_leaf(settings.min_shards):
            check_shards(settings.min_shards, "")
        if is_number(settings.lr_scale):
            check_not_negative(lr_scale=settings.lr_scale)
        if not is_by_leaf(settings.paged):
            _check_paged(settings.paged)
        if settings.device_bytes is not None:
            _check_device_bytes(settings)
        for name in ("min_quantized_size", "page_bytes", "seed"):
            check_int(name, getattr(settings, name))
        check_positive(
            grad_clip_norm=settings.grad_clip_norm,
            grad_clip_value=settings.grad_clip_value,
            max_unorm=settings.max_unorm,
        )
        check_bool(
            skip_nonfinite=settings.skip_nonfinite, record_norms=settings.record_norms
        )
        if isinstance(settings.layer_axes, jax.Array):
            check_int("layer_axes", settings.layer_axes)
        if settings.percentile_clipping is not None:
            _check_percentile(settings.percentile_clipping)
            if settings.percentile_clipping == 100:
                settings = replace(settings, percentile_clipping=None)
        return settings

    @property
    def clips_norms(self) -> bool:
        """Whether the norms of gradients limit them."""
        return self.grad_clip_norm is not None or self.percentile_clipping is not None

    @property
    def rounds_by_leaf(self) -> bool:
        """Whether the option `weights` may differ from leaf to leaf."""
        return is_by_leaf(self.weights)

    @property
    def keeps_remainders(self) -> bool:
        """Whether states have a tree of what rounding of parameters lost."""
        if callable(self.weights):
            return True
        return any(WEIGHTS.get(x, 0) for x in jax.tree.leaves(self.weights))

    def state_by_leaf(self, slots: tuple[Slot, ...]) -> bool:
        """Whether the option `state` may differ from leaf to leaf."""
        return callable(self.state) or not is_state(self.state, slots)


def _check_percentile(percentile: Any) -> None:
    check_int("percentile_clipping", percentile)
    if not 1 <= percentile <= 100:
        raise ValueError(
            f"percentile_clipping={percentile} must be from 1 to 100 (100: no clipping)"
        )


def _check_paged(value: Any) -> None:
    if not is_paged(value):
        raise ValueError(f"paged={value!r} must be True, False or 'auto'")


def _check_device_bytes(settings: "Settings") -> None:
    check_int("device_bytes", settings.device_bytes)
    check_positive(device_bytes=settings.device_bytes)
    if not is_by_leaf(settings.paged) and settings.paged != "auto":
        raise ValueError(
            f"device_bytes={settings.device_bytes} is read with paged='auto' only, and "
            f"paged={settings.paged!r}. Write paged='auto', or leave it out"
        )


def with_options(optimizer: _F) -> _F:
    """Take arguments in the words of others, and show all options in the signature.

    `optax.inject_hyperparams` reads signatures: it must find the names (for its
    static_args) and no integer defaults, which it would turn into arrays.
    """
    signature = inspect.signature(optimizer)
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in Options.__annotations__
    ]
    shown = signature.replace(parameters=[*given, *named])
    name = optimizer.__name__  # type: ignore[attr-defined]
    callee = Callee(name, name, shown)

    @wraps(optimizer)
    def called(*args: Any, **kwargs: Any) -> Any:
        return optimizer(**translated(callee, args, kwargs))

    called.__signature__ = shown  # type: ignore[attr-defined]
    return cast(_F, called)
