"""What is timed, and other libraries' AdamW as such, where they are installed.

Each as its users run it: those of torch without a graph, those of JAX jitted. Torch and
JAX share the device, and take turns on it.
"""

import gc
import importlib.util
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_RATE, _NORM = 1e-4, 1.0


@dataclass
class Contender:
    """Something to time: `carry = step(fixed, carry)`, and what it has to move."""

    name: str
    step: Callable[[Any, Any], Any]
    fixed: Any
    carry: Any
    traffic: int
    state_bytes: int = 0
    wait: Callable[[Any], Any] = jax.block_until_ready
    times: list[float] = field(default_factory=list)

    def run(self, repeats: int) -> float:
        """Seconds for each of some steps in a row."""
        start = time.perf_counter()
        for _ in range(repeats):
            self.carry = self.step(self.fixed, self.carry)
        self.wait(self.carry)
        return (time.perf_counter() - start) / repeats


@dataclass
class Task:
    """What is stepped.

    Attributes:
      params: a tree of JAX arrays.
      grads: the same.
      whole: clip by the global norm and check for what is not finite, too.
      tensors: gradients that all optimizers of torch share, as they are large.
    """

    params: Any
    grads: Any
    whole: bool
    tensors: list[Any] = field(default_factory=list)

    def traffic(self, state_bytes: int) -> int:
        """Bytes that a step needs: one read of everything, one write but of gradients.

        Their norm has to be known first, which takes a second read.
        """
        grads = nbytes(self.grads) * (2 if self.whole else 1)
        return grads + 2 * nbytes(self.params) + 2 * state_bytes


class Rival(NamedTuple):
    """A library's optimizer.

    Attributes:
      module: which is imported.
      package: that it is installed from.
      build: makes the contender, of a name and a task.
    """

    module: str
    package: str
    build: Callable[[str, Task], Contender]


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def reason(error: Exception) -> str:
    """An exception in one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:200]


def measure(
    contenders: Sequence[Contender], repeats: int, seconds: float
) -> tuple[list[Contender], dict[str, str]]:
    """Time the contenders in turn, `repeats` times; and why those that fail do.

    Each turn takes as many steps in a row as last `seconds`, so that on a fast device
    neither dispatch nor the wait at the end counts. One that fails leaves the others.
    """
    turns, failed = [], {}
    for rival in contenders:
        try:
            rival.run(2)  # compiles; and again, for what only the first run allocates
            turns.append((rival, min(max(math.ceil(seconds / rival.run(1)), 1), 1000)))
        except Exception as error:
            traceback.print_exc()
            failed[rival.name] = reason(error)
            rival.carry = rival.fixed = None
    for _ in range(repeats):
        for rival, n in turns:
            rival.times.append(rival.run(n))
    return [rival for rival, _ in turns], failed


def installed(
    task: Task, names: Sequence[str]
) -> tuple[list[Contender], dict[str, str]]:
    """The rivals that are here, and why the others are not."""
    gc.collect()  # optimizers of the last task may be in cycles, with their memory
    found, missing = [], {}
    for name in names:
        module, package, build = RIVALS[name]
        if importlib.util.find_spec(module) is None:
            missing[name] = f"{package} is not installed"
            continue
        try:
            found.append(build(name, task))
        except Exception as error:
            missing[name] = reason(error)
    return found, missing


# ----------------------------------------------------------------------------- torch


def _torch_device() -> str:
    """The one of torch that is JAX's, too."""
    import torch

    names = {"gpu": "cuda", "cpu": "cpu"}
    name = names.get(jax.default_backend())
    if name is None or (name == "cuda" and not torch.cuda.is_available()):
        raise RuntimeError(f"torch {torch.__version__} has no {jax.default_backend()}")
    return name


def _storages(x: Any, found: dict[int, int]) -> None:
    """Address and bytes of all that torch stores in an object: shared ones once."""
    import torch

    if hasattr(x, "__tensor_flatten__"):  # a tensor made of tensors
        parts: Any = [getattr(x, name) for name in x.__tensor_flatten__()[0]]
    elif isinstance(x, torch.Tensor):
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return
    else:
        parts = (x if isinstance(x, dict) else getattr(x, "__dict__", {})).values()
    for part in parts:
        _storages(part, found)


def _torch(make: Callable[..., Any], name: str, task: Task) -> Contender:
    """An optimizer of torch on tensors of the same shapes, in a loop as users write it.

    `make` is a function of the parameters.
    """
    import torch

    device = _torch_device()
    leaves = jax.tree.leaves(task.params)
    like = {"dtype": getattr(torch, leaves[0].dtype.name), "device": device}
    params = [torch.randn(leaf.shape, **like).requires_grad_() for leaf in leaves]
    if not task.tensors:
        task.tensors += [torch.randn(leaf.shape, **like) for leaf in leaves]
    for p, g in zip(params, task.tensors, strict=True):
        p.grad = g
    optimizer = make(params)

    def step(fixed: None, carry: None) -> None:
        if task.whole:
            norm = torch.nn.utils.clip_grad_norm_(params, _NORM)
            if not torch.isfinite(norm):  # waits for the device
                return
        optimizer.step()

    def wait(carry: None) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    step(None, None)  # makes the state
    stored: dict[int, int] = {}
    _storages(dict(enumerate(optimizer.state.values())), stored)
    state = sum(stored.values())
    return Contender(name, step, None, None, task.traffic(state), state, wait)


def _torch_fused(name: str, task: Task) -> Contender:
    """32-bit moments, a few launches for all parameters."""
    import torch

    return _torch(partial(torch.optim.AdamW, lr=_RATE, fused=True), name, task)


def _bitsandbytes(name: str, task: Task) -> Contender:
    """A launch and a wait for each parameter."""
    from bitsandbytes.optim import AdamW8bit

    return _torch(partial(AdamW8bit, lr=_RATE), name, task)


def _torchao(name: str, task: Task) -> Contender:
    """Compiled once for each shape."""
    from torchao.optim import AdamW8bit

    return _torch(partial(AdamW8bit, lr=_RATE), name, task)


def _flashoptim(bits: int | None, name: str, task: Task) -> Contender:
    """`bits`: of parameters with their error terms; None: as they are."""
    from flashoptim import FlashAdamW

    return _torch(partial(FlashAdamW, lr=_RATE, master_weight_bits=bits), name, task)


# ------------------------------------------------------------------------------- JAX


def _flashoptim_jax(bits: int | None, name: str, task: Task) -> Contender:
    """Its kernels are for GPUs; elsewhere it is what XLA makes of it.

    What is not finite is for the host to see, as with torch. The kernels write in
    place, so that `lax.cond` around them would copy parameters and state.
    """
    from flashoptim_jax import flash_adamw

    fused = jax.default_backend() == "gpu"
    tx = flash_adamw(_RATE, master_weight_bits=bits, fused=fused)
    norm_of = jax.jit(optax.global_norm)

    @partial(jax.jit, donate_argnums=1)
    def alone(grads: Any, carry: Any) -> Any:
        return tx.step(*carry, grads)

    @partial(jax.jit, donate_argnums=1)
    def clipped(grads: Any, carry: Any, norm: jax.Array) -> Any:
        factor = jnp.minimum(1.0, _NORM / norm)
        return tx.step(*carry, jax.tree.map(lambda g: g * factor, grads))

    def whole(grads: Any, carry: Any) -> Any:
        norm = norm_of(grads)
        return clipped(grads, carry, norm) if math.isfinite(norm) else carry

    params = jax.tree.map(jnp.copy, task.params)
    state = jax.jit(tx.init)(params)
    size, step = nbytes(state), whole if task.whole else alone
    return Contender(name, step, task.grads, (params, state), task.traffic(size), size)


RIVALS: dict[str, Rival] = {
    "torch-fused": Rival("torch", "torch", _torch_fused),
    "bitsandbytes": Rival("bitsandbytes", "bitsandbytes", _bitsandbytes),
    "flashoptim": Rival("flashoptim", "flashoptim", partial(_flashoptim, None)),
    "flashoptim-24": Rival("flashoptim", "flashoptim", partial(_flashoptim, 24)),
    "flashoptim-jax": Rival(
        "flashoptim_jax", "flashoptim-jax", partial(_flashoptim_jax, None)
    ),
    "flashoptim-jax-24": Rival(
        "flashoptim_jax", "flashoptim-jax", partial(_flashoptim_jax, 24)
    ),
    "torchao": Rival("torchao", "torchao", _torchao),
}
