"""`quantized`: any optax transformation with its moments in 8 bits."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import optax

from ..options import Options, PerLeaf, Settings
from ..values import formats_of
from .structure import Structure
from .wrapper import Wrapper


class Quantized(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` around another transformation.

    Attributes:
      init: `init(params) -> state`.
      update: `update(grads, state, params, **extra_args) -> (updates, state)`.
      wrapper: the other transformation, and what stores its moments.
    """

    wrapper: Wrapper

    def __new__(cls, wrapper: Wrapper) -> "Quantized":
        made = super().__new__(cls, wrapper.init, wrapper.update)  # type: ignore
        made.wrapper = wrapper
        return made

    def inner_state(self, state: Any, params: Any) -> Any:
        """The other transformation's own state, for what reads it; also inside of jit.

        Such as `optax.contrib.schedule_free_eval_params(tx.inner_state(state, params),
        params)`.

        Args:
          state: what `init` or the last update returned.
          params: the parameters.
        """
        return self.wrapper.inner_state(state, params)


_Made = TypeVar("_Made")
_Arguments = ParamSpec("_Arguments")


def _without_others(
    function: Callable[_Arguments, _Made],
) -> Callable[_Arguments, _Made]:
    """An error that says where the options are that a function does not take."""
    own = inspect.signature(function).parameters

    @functools.wraps(function)
    def called(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Made:
        for name in kwargs:
            if name in Options.__annotations__ and name not in own:
                raise TypeError(
                    f"quantized takes no {name!r}, which is an option of Octavo's own "
                    f"optimizers: write optim.adamw(..., {name}=...) or another one of "
                    f"them, or leave it out. quantized takes {', '.join(own)}"
                )
        return function(*args, **kwargs)

    return called


@_without_others
def quantized(
    tx: optax.GradientTransformation,
    *,
    state: PerLeaf[str] = "8bit",
    slots: Mapping[str, str | None] | None = None,
    min_quantized_size: int = 4096,
    block_size: PerLeaf[int] = 32,
    block_axis: PerLeaf[int | None] = None,
    sharding: Any = None,
    seed: int = 0,
) -> Quantized:
    """Any optax transformation, with its moments in 8 bits between steps.

        decode the moments,  u, state = tx.update(g, state, p),  encode them

    Moments are the fields of the state that are trees like the parameters: `mu`, `nu`,
    `trace` and others of optax are known by their names. A signed moment beside a mean
    of squares is stored relative to its root, as Octavo's own Adam does. Parameters in
    the state, and moments that 8 bits would spoil, stay as they are, as everything else
    does: docs/quantized.md lists all, and measures 13 transformations.

    This is plain XLA code, and no fused kernel: while a leaf's step runs, its moments
    are in memory in 32 bits. For an algorithm that Octavo has itself, take that.

    2.125 bytes per parameter for a first and a second moment, 1.0625 for one.

    Args:
      tx: the transformation: an optimizer, a `chain`, or a part of one.
      state: how moments are stored, per leaf: see `octavo.optim.Options`.
      slots: for a moment, by its name (`"mu"`) or its path (`"0/mu"`): its format, its
        role, or both. Default None: as their names say. A name that Octavo does not
        know needs a role: `slots={"velocity": "signed"}`; the error lists them.
        `"kept"` leaves a field as it is.
      min_quantized_size: smaller leaves stay in 32 bits. Default 4096: they are norms
        and biases.
      block_size: values that share a scale, per leaf. Default 32.
      block_axis: the axis of blocks, per leaf. Default None: the longest but the last.
      sharding: of the parameters: see `octavo.optim.Options`.
      seed: of the unbiased rounding. Default 0.

    Returns:
      The transformation. Its state is a `QuantizedState`: `state.moments["0"].mu` has
      codes of the parameters' shapes, where the other state has `state[0].mu`.

    Raises:
      ValueError: where the state has no moments, or one of an unknown name.

    >>> import jax.numpy as jnp, optax
    >>> from octavo import optim
    >>> tx = optim.quantized(optax.contrib.muon(1e-3))
    >>> params = {"kernel": jnp.ones((1024, 1024)), "bias": jnp.zeros(1024)}
    >>> report = optim.memory_report(tx, params)
    >>> print(f"{report.bytes / report.parameters:.2f}")
    1.07
    """
    if isinstance(state, str):
        formats_of(state, ())
    options = Options(
        min_quantized_size=min_quantized_size,
        block_size=block_size,
        block_axis=block_axis,
        sharding=sharding,
        seed=seed,
    )
    settings = Settings.of(options, ())
    structure = Structure.of(tx, slots or {})
    inner = optax.with_extra_args_support(tx)
    return Quantized(Wrapper(inner, structure, state, settings))
