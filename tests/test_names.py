"""Names and words from other libraries: what they mean here, and what is refused."""

import inspect
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from calls import NAMES, ours, same

from octavo import optim
from octavo.optim import aliases
from octavo.optim.words import TORCH_DEFAULTS

# --------------------------------------------------------------------- words and values


def test_words_that_ask_for_nothing() -> None:
    nothing = {"block_wise": True, "is_paged": False, "args": None}
    torchs = {"foreach": None, "fused": True, "maximize": False}
    others = {"capturable": True, "skip_zeros": False, "optim_bits": 8}
    for call in (nothing, torchs, others):
        same(optim.adamw(1e-3, **call), optim.adamw(1e-3, weight_decay=0.01))
    optaxs = {"eps_root": 0.0, "mu_dtype": None}
    same(optim.adamw(1e-3, **optaxs), optim.adamw(1e-3))
    same(optim.adam(1e-3, weight_decay=0), optim.adam(1e-3))
    same(optim.lamb(1e-3, amsgrad=False, adam_w_mode=True), optim.lamb(1e-3))
    same(
        optim.adam(lr=1e-3, min_8bit_size=64, optim_bits=32),
        optim.adam32bit(1e-3, min_quantized_size=64),
    )
    same(
        optim.adamw8bit(lr=1e-3, is_paged=True),
        optim.paged_adamw8bit(1e-3, weight_decay=0.01),
    )
    same(
        optim.paged_lion32bit(lr=1e-4),
        optim.lion(1e-4, 0.9, 0.99, 0.0, paged=True, state="32bit"),
    )


PARAMS = {"w": jnp.ones(3)}
_ADAMW = "optim.adamw(0.001, weight_decay=0.01)"
_OBJECT = SimpleNamespace(optim_bits=8, min_8bit_size=64, max_unorm=0.0)


@pytest.mark.parametrize(
    ("call", "reason", "written"),
    [
        ("adamw(lr=1e-3, block_wise=False)", "one scale for a whole array", _ADAMW),
        ("adamw(lr=1e-3, skip_zeros=True)", "whose gradient is 0", _ADAMW),
        ("adamw(lr=1e-3, differentiable=True)", "no such mode", _ADAMW),
        (
            "adamw(lr=1e-3, maximize=True)",
            "steps go against the gradient",
            f"optax.chain(optax.scale(-1.0), {_ADAMW})",
        ),
        (
            "adam(lr=1e-3, args=OBJECT)",
            "an object must not replace arguments",
            "optim.adam(0.001, state='8bit', min_quantized_size=64)",
        ),
        (
            "adamax(lr=2e-3, weight_decay=0.1)",
            "torch's decay is a part of the gradient",
            "optax.chain(optax.add_decayed_weights(0.1), optim.adamax(0.002))",
        ),
        ("adam(1e-3, eps_root=1e-8)", "eps is added to the root", "optim.adam(0.001)"),
        ("nadam(momentum_decay=0.004)", "torch's NAdam grows", "optim.nadam(0.002)"),
        ("lion(1e-4, amsgrad=True)", "only adam and adamw", "optim.lion(0.0001)"),
        ("adam8bit(optim_bits=32)", "not '32bit'", "optim.adam(0.001, state='32bit')"),
        (
            "nadam(1e-3, nesterov=False)",
            "nadam has nesterov=True, not False",
            "optim.adam(0.001, nesterov=False)",
        ),
        (
            "adam(1e-3, (0.9, 0.95), 1e-8)",
            "b1=(0.9, 0.95) must be a number in [0, 1)",
            "optim.adam(0.001, betas=(0.9, 0.95))",
        ),
        (
            "lion(lr=1e-4, betas=0.9)",
            "betas=(0.9,) must be 2 numbers",
            "optim.lion(0.001, betas=(0.9, 0.99))",
        ),
    ],
)
def test_refused_with_the_reason_and_the_call(
    call: str, reason: str, written: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        ours(f"optim.{call}", OBJECT=_OBJECT)
    assert str(error.value).endswith(f"Write {written}")
    ours(written)


def test_decay_of_adam_shows_both_decays() -> None:
    for name, twin in (
        ("adam8bit", "adamw8bit(0.001, weight_decay=0.1)"),
        ("nadam", "nadamw(0.001, weight_decay=0.1)"),
        ("amsgrad", "adamw(0.001, amsgrad=True, weight_decay=0.1)"),
    ):
        with pytest.raises(ValueError, match=r"^weight_decay=0.1: torch's") as error:
            getattr(optim, name)(1e-3, weight_decay=0.1)
        l2 = f"optax.chain(optax.add_decayed_weights(0.1), optim.{name}(0.001))"
        message = f"Write optim.{twin} for the second, which is AdamW; for the first "
        assert str(error.value).endswith(message + l2)
        ours(f"optim.{twin}")
        ours(l2)


@pytest.mark.parametrize(
    "call",
    [
        "adamw8bit(PARAMS, lr=1e-3)",
        "adamw8bit([jnp.ones(3)], 1e-3)",
        "adamw8bit((p for p in [1.0]), 1e-3, (0.9, 0.999))",
        "adamw8bit(jnp.ones(3), betas=(0.9, 0.999))",
        "adamw8bit(params=PARAMS, lr=1e-3)",
    ],
)
def test_parameters_are_for_init(call: str) -> None:
    with pytest.raises(TypeError, match="adamw8bit takes no parameters") as error:
        ours(f"optim.{call}", PARAMS=PARAMS, jnp=jnp)
    written = "tx = optim.adamw8bit(0.001, weight_decay=0.01); state = tx.init(params)"
    assert str(error.value).endswith(written)
    exec(written, {**NAMES, "params": PARAMS})


def test_parameters_and_more_without_names() -> None:
    with pytest.raises(TypeError, match=r"adam\(lr=0.1, betas=\(0.9, 0.9\), \.\.\.\)"):
        ours("optim.adam([1.0], 0.1, (0.9, 0.9), 1e-8)")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("adam(1e-3, lr=1e-3)", "learning_rate and lr are the same. Write one"),
        ("adam(lr=1e-3, betas=(0.9, 0.9), b1=0.9)", "betas and b1 are the same"),
        ("rmsprop(lr=1e-3, alpha=0.9, decay=0.9)", "alpha and decay are the same"),
        ("adam(1e-3, 0.9, b1=0.9)", "adam: b1 is given twice"),
        ("adam()", r"needs a learning rate. Write optim.adam\(0.001\)"),
        ("lars(momentum=0.9)", r"needs a learning rate. Write optim.lars\(0.001"),
        ("lion(1, 2, 3, 4, 5, 6)", "at most 5 arguments without a name, but 6"),
        ("sgd(0.1, betas=(0.9, 0.9))", "unknown option 'betas'"),
        ("lion(1e-4, alpha=0.9)", "unknown option 'alpha'"),
    ],
)
def test_arguments_that_do_not_fit(call: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ours(f"optim.{call}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("adam('1e-3')", "learning_rate='1e-3' must be a number, or a schedule: a"),
        ("adam(lr=None)", "learning_rate=None must be a number, or a schedule"),
        ("adam(True)", "learning_rate=True must be a number, or a schedule"),
        ("adam(learning_rate=[1.0])", r"learning_rate=\[1.0\] must be a number"),
        ("adam(-1e-3)", "learning_rate=-0.001 must be finite and not negative; st"),
        ("sgd(float('nan'))", "learning_rate=nan must be finite and not negative"),
        ("adam(1e-3, b1='0.9')", r"b1='0.9' must be in \[0, 1\)"),
        ("adam(1e-3, eps=None)", "eps=None must be finite and not negative"),
        ("adam(1e-3, optim_bits=4)", "optim_bits=4 must be 8 or 32"),
        ("sgd(0.1, 0.9, 0, 5e-4)", "nesterov=0 must be True or False"),
    ],
)
def test_values_that_cannot_be(call: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(f"optim.{call}")


# -------------------------------------------------------------------------------- names


def test_every_optimizer_has_a_name_with_8_and_with_32_bits() -> None:
    found = {name for name in dir(optim) if name in aliases.__all__}
    assert found == set(aliases.__all__)
    for stem in TORCH_DEFAULTS:
        for bits, dtype in (("8bit", "int8"), ("32bit", "float32")):
            made = getattr(optim, stem + bits)
            assert made.__name__ == stem + bits
            assert "state" not in inspect.signature(made).parameters
            assert f"state={bits!r}" in made.__doc__
            rate = {"momentum": 0.9} if stem == "sgd" else {}
            state = jax.eval_shape(
                made(1e-3, **rate).init, jax.ShapeDtypeStruct((64, 128), "float32")
            )
            last = list(state.trees.values())[-1 if bits == "32bit" else 0]
            assert last.dtype == dtype, made


def test_names_of_optax_are_variants_of_adam() -> None:
    same(optim.nadam(1e-3), optim.adam(1e-3, nesterov=True))
    same(optim.nadamw(1e-3), optim.adamw(1e-3, nesterov=True))
    same(optim.amsgrad(1e-3), optim.adam(1e-3, amsgrad=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adam8", "did you mean 'adam8bit'?"),
        ("adamw_8bits", "did you mean 'adamw8bit'?"),
        ("AdamW4bit", "did you mean 'adamw8bit'?"),
        ("memory_reports", "did you mean 'memory_report'?"),
        ("Adam8bit", "Write tx = optim.adam8bit(1e-3); state = tx.init(params)"),
        ("AdEMAMix", "Write tx = optim.ademamix(1e-3); state = tx.init(params)"),
        (
            "PagedLion8bit",
            "Write tx = optim.paged_lion8bit(1e-3); state = tx.init(params)",
        ),
        (
            "PagedRMSprop",
            "Write tx = optim.rmsprop(1e-3, paged=True); state = tx.init(params)",
        ),
        ("nothing_like_it", "has no attribute 'nothing_like_it'"),
        ("__wrapped__", "has no attribute '__wrapped__'"),
    ],
)
def test_a_name_that_is_not_there_suggests_another(name: str, message: str) -> None:
    with pytest.raises(AttributeError) as error:
        getattr(optim, name)
    assert str(error.value).endswith(message)


def test_injected_hyperparameters_reach_names_with_a_fixed_state() -> None:
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.inject_hyperparams(optim.adamw8bit)(1e-3, weight_decay=0.1)
        params = {"w": jnp.ones((64, 128))}
        state = jax.eval_shape(tx.init, params)
    assert {"learning_rate", "b1", "weight_decay"} <= set(state.hyperparams)
    assert state.inner_state.nu["w"].dtype == "int8"
