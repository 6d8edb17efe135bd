"""What torch, bitsandbytes, torchao, braintools and optax call things: tables."""

from typing import Any, NamedTuple

# Where torch and bitsandbytes differ from optax (for LARS: braintools, whose rule is
# the paper's). SGD's rate is torch's; for LARS there is none.
TORCH_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"learning_rate": 1e-3},
    "amsgrad": {"learning_rate": 1e-3},
    "adamw": {"learning_rate": 1e-3, "weight_decay": 0.01},
    "nadam": {"learning_rate": 2e-3},
    "nadamw": {"learning_rate": 2e-3, "weight_decay": 0.01},
    "adamax": {"learning_rate": 2e-3},
    "ademamix": {"learning_rate": 1e-3, "weight_decay": 0.01},
    "lion": {"learning_rate": 1e-4, "weight_decay": 0.0},
    "sgd": {"learning_rate": 1e-3},
    "rmsprop": {
        "learning_rate": 1e-2,
        "decay": 0.99,
        "eps_in_sqrt": False,
        "learning_rate_first": False,
    },
    "adagrad": {
        "learning_rate": 1e-2,
        "initial_accumulator_value": 0.0,
        "eps": 1e-10,
        "eps_in_sqrt": False,
    },
    "lamb": {"learning_rate": 1e-3},
    "lars": {"eps": 1e-8, "learning_rate_first": False},
}

# Another name for the same.
SAME = {
    "lr": "learning_rate",
    "min_8bit_size": "min_quantized_size",
    "is_paged": "paged",
    "alpha": "decay",
    "rho": "decay",
}
BETAS = ("b1", "b2", "b3")
STATES = {8: "8bit", 32: "32bit"}
ROUNDED = {True: "stochastic", False: "nearest"}  # of bfloat16, in torchao
# Attributes of the object that bitsandbytes takes as `args`.
OF_ARGS = ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros")


class Word(NamedTuple):
    """An argument elsewhere, for which there is none here.

    Attributes:
      harmless: values that ask for nothing, as None always does; `...`: all of them.
      reason: why others are refused.
      instead: what to write: `{call}` without the word, `{decoupled}` for AdamW's.
    """

    harmless: Any
    reason: str = ""
    instead: str = "{call}"


_L2 = "optax.chain(optax.add_decayed_weights({value}), {call})"
_STATE = Word((), "the option state says how moments are stored, such as state='bf16'")

# Only torch, bitsandbytes and torchao have these: a call with one is from there.
TORCH_WORDS: dict[str, Word] = {
    "foreach": Word(...),
    "fused": Word(...),
    "capturable": Word(...),
    "decoupled_weight_decay": Word(...),  # beside weight_decay, which is refused
    "maximize": Word(
        (False,),
        "steps go against the gradient, so turn the gradient around",
        "optax.chain(optax.scale(-1.0), {call})",
    ),
    "differentiable": Word((False,), "there is no such mode"),
    "args": Word((), "an object must not replace arguments: give them by their names"),
    "block_wise": Word(
        (True,), "one scale for a whole array loses small values, so there are blocks"
    ),
    "skip_zeros": Word(
        (False,), "values whose gradient is 0 take their steps like all others"
    ),
    "adam_w_mode": Word((True,), "the decay is part of LAMB's step, as published"),
    "momentum_decay": Word(
        (), "the momentum is constant, as in optax; that of torch's NAdam grows"
    ),
}
OTHER_WORDS: dict[str, Word] = {
    "weight_decay": Word((0,), "torch's decay is a part of the gradient", _L2),
    "amsgrad": Word((False,), "only adam and adamw have it"),
    "nesterov": Word((False,), "this optimizer has no such variant"),
    "dampening": Word((0,), "this optimizer has no such variant"),
    "eps_root": Word((0,), "eps is added to the root, and nothing under it"),
    "mu_dtype": _STATE,
    "accumulator_dtype": _STATE,
}
# Where the optimizer has words of its own.
OWN_WORDS: dict[str, dict[str, Word]] = {
    "adam": {
        "weight_decay": Word(
            (0,),
            "torch's Adam adds the decay to the gradient, that of bitsandbytes lets "
            "the weights themselves decay",
            "{decoupled} for the second, which is AdamW; for the first " + _L2,
        )
    }
}


def word_of(optimizer: str, name: str) -> Word | None:
    """What there is to say of an argument that an optimizer does not have."""
    own = OWN_WORDS.get(optimizer, {}).get(name)
    return own or TORCH_WORDS.get(name) or OTHER_WORDS.get(name)
