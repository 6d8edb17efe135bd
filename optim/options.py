"""Options that every optimizer takes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypedDict, TypeVar

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])
PerLeaf: TypeAlias = _T | Callable[[str], _T]
StateFormat: TypeAlias = str | Mapping[str, str]


class Options(TypedDict, total=False):
    """Keyword options of every optimizer.

    Those marked "per leaf" may be functions of the leaf's path, `"encoder/kernel"`.
    Limits on gradients and steps may change without recompiling, as hyperparameters do.

    Attributes:
      state: how moments are stored, per leaf: `"8bit"` (default), `"dynamic8"`
        (bitsandbytes' code book), `"bf16"`, `"32bit"`; or one for each slot,
        `{"mu": "bf16", "nu": "8bit"}`.
      min_quantized_size: leaves with fewer values (in a layer, see `layer_axes`) keep
        32-bit state. Default 4096: they are norms and biases, sensitive and small. Of
        the global shape, whatever the mesh.
      block_size: values that share a scale, a positive multiple of 8, per leaf.
        Default 32, 2 bytes of scale for 32 codes: half the error of 256, and the height
        of an int8 tile on TPU.
      block_axis: the axis along which blocks run, per leaf. Default None: the longest
        one other than the last.
      layer_axes: axes along which leaves stack layers, as scan over layers does: an
        int or a tuple of them for every leaf, a tree of those like the parameters (or a
        prefix), or per leaf; None: the leaf is one layer. Each layer has norms and a
        ratio of its own, and no block spans two.
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
      sharding: how parameters lie on the devices: a tree of `NamedSharding` like them,
        as `jax.tree.map(lambda p: p.sharding, params)` gives (or a prefix; or
        PartitionSpecs, within `jax.set_mesh`). Default None: the types of the arrays
        tell where the mesh has explicit axes, as `jax.make_mesh` gives it; on several
        devices where they do not, the step is left to XLA.
      backend: `"xla"`, `"tpu"` or `"triton"`. Default None: the kernel of the device
        that JAX uses, and XLA for small, 1-D and unquantized leaves.
      seed: int, of the unbiased rounding; the random numbers are a function of it, the
        step, and the position in the tree. Default 0.
    """

    state: PerLeaf[StateFormat]
    min_quantized_size: int
    block_size: PerLeaf[int]
    block_axis: PerLeaf[int | None]
    layer_axes: Any
    grad_clip_norm: float | None
    grad_clip_value: float | None
    percentile_clipping: int | None
    max_unorm: float | None
    skip_nonfinite: bool
    record_norms: bool
    sharding: Any
    backend: str | None
    seed: int


def with_options(optimizer: _F) -> _F:
    """Show the keyword options in the signature of `optimizer(..., **options)`.

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
    optimizer.__signature__ = shown  # type: ignore[attr-defined]
    return optimizer
