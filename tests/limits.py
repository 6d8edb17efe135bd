"""Clips and guards that tests combine, and a tree with leaves of every kind."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from octavo import optim

from cases import RULES, params_and_grads

# Gradients of `tree` have a norm of about 200 and values of up to 40.
CLIPS: dict[str, dict[str, float]] = {
    "norm": {"grad_clip_norm": 30.0},
    "value": {"grad_clip_value": 0.5},
    "both": {"grad_clip_norm": 30.0, "grad_clip_value": 0.5},
}
# What keeps something in the state, each with what it is called there.
KEEPS: dict[str, dict[str, Any]] = {
    "skipped": {"skip_nonfinite": True},
    "clip_history": {"percentile_clipping": 20},
    "norms": {"record_norms": True},
}
EVERYTHING: dict[str, Any] = {"max_unorm": 0.5, **CLIPS["both"]}
EVERYTHING |= {k: v for options in KEEPS.values() for k, v in options.items()}


def everything(rule: str) -> dict[str, Any]:
    """All options that a row of `RULES` takes together."""
    takes = RULES[rule].max_unorm
    return {k: v for k, v in EVERYTHING.items() if takes or k != "max_unorm"}


def limited(rule: str, rate: float, **options: Any) -> optim.Transformation:
    """The optimizer of a row of `RULES`, with options that override the row's."""
    case = RULES[rule]
    return case.ours(rate, **{**case.kwargs, **options})


def tree(steps: int = 1, dtype: Any = jnp.float32) -> tuple[Any, list[Any]]:
    """A quantized leaf, a small one and a 0-d one; their gradients."""
    kernel, kernel_grads = params_and_grads((64, 96), steps, dtype)
    bias, bias_grads = params_and_grads((96,), steps, dtype, seed=1)
    params = {"dense": {"kernel": kernel, "bias": bias}, "scale": bias[0]}
    grads = [
        {"dense": {"kernel": k, "bias": b}, "scale": b[0]}
        for k, b in zip(kernel_grads, bias_grads, strict=True)
    ]
    return params, grads


def leaf_at(tree: Any, path: str) -> np.ndarray:
    """The leaf at a path like those of `last_norms`, as a vector."""
    for key in path.split("/"):
        tree = tree[key]
    return np.ravel(tree)


def optax_clipped(grads: list[Any], clips: dict[str, float]) -> list[Any]:
    """The gradients as optax clips them."""
    parts = {"grad_clip_norm": optax.clip_by_global_norm, "grad_clip_value": optax.clip}
    clip = optax.chain(*(parts[name](value) for name, value in clips.items()))
    return [clip.update(g, clip.init(g))[0] for g in grads]
