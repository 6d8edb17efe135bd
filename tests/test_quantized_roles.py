"""What `optim.quantized` knows of moments, and what it says where it does not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from octavo import optim

from bits import assert_same_bits
from runs import random

contrib = optax.contrib


@pytest.fixture(autouse=True)
def promotion() -> Any:
    """optax itself relies on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# Some of everything that keeps a tree like the parameters.
OF_OPTAX: dict[str, Callable[[], Any]] = {
    "adadelta": lambda: optax.adadelta(0.1),
    "adafactor": lambda: optax.adafactor(0.1, momentum=0.9),
    "adagrad": lambda: optax.adagrad(0.1),
    "adan": lambda: optax.adan(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "lion": lambda: optax.lion(0.1),
    "momo": lambda: contrib.momo(0.1),
    "momo_adam": lambda: contrib.momo_adam(0.1),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "optimistic": lambda: optax.optimistic_gradient_descent(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, centered=True, momentum=0.9),
    "simplified": lambda: contrib.simplified_ademamix(0.1, b1=0.9, alpha=1.0),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.adam(0.1)),
    "mechanize": lambda: contrib.mechanize(optax.adam(0.1)),
}
NOT_GOOD: dict[str, Callable[[], Any]] = {
    "cocob": contrib.cocob,
    "dog": lambda: contrib.dog(0.1),
    "dowg": lambda: contrib.dowg(0.1),
    "madgrad": lambda: contrib.madgrad(0.1),
    "rprop": lambda: optax.rprop(0.1),
    "sm3": lambda: optax.sm3(0.1),
    "sgd": lambda: optax.sgd(0.1),
    "adam of Octavo": lambda: optim.adam(0.1),
    "twice": lambda: optim.quantized(optax.adam(0.1)),
}


@pytest.mark.parametrize("name", OF_OPTAX)
def test_the_moments_of_optax_are_known(name: str) -> None:
    """By name alone; what is stored as codes has the parameter's shape."""
    tx = optim.quantized(OF_OPTAX[name]())
    params = {"kernel": jax.ShapeDtypeStruct((128, 256), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    shapes = [
        leaf.shape
        for part in state.moments.values()
        for slot in part.slots
        for leaf in part.codes(slot).leaves
    ]
    assert shapes and set(shapes) == {(128, 256)}


@pytest.mark.parametrize("name", NOT_GOOD)
def test_a_state_without_moments_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="no moments to store"):
        optim.quantized(NOT_GOOD[name]())


def zeros(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def two_moments() -> optax.GradientTransformation:
    """Whose state is a tuple, without names."""
    return optax.GradientTransformation(
        lambda p: (zeros(p), zeros(p)), lambda u, s, p=None: (u, (u, zeros(u)))
    )


ADAM = optax.adam(0.1)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no name": (
        lambda: optim.quantized(two_moments()),
        "'0' of the state .* Write slots={'moment0': 'signed'}",
    ),
    "no such slot": (
        lambda: optim.quantized(ADAM, slots={"momentum": "8bit"}),
        "no moment 'momentum'; its moments are '0/mu', '0/nu'",
    ),
    "no such format": (
        lambda: optim.quantized(ADAM, slots={"mu": "9bit"}),
        "'9bit' is no format .* and no role",
    ),
    "no such state": (
        lambda: optim.quantized(ADAM, state="9bit"),
        "unknown state format '9bit'",
    ),
    "state by slot": (
        lambda: optim.quantized(ADAM, state={"mu": "8bit"}).init(random(0)),
        "slots=",
    ),
    "init without leaves": (
        lambda: optim.quantized(optax.flatten(ADAM)),
        "put optim.quantized inside",
    ),
    "another state": (
        lambda: optim.quantized(ADAM).update(random(0), ADAM.init(random(0))),
        "is a tuple, not that of optim.quantized",
    ),
    "another transformation": (
        lambda: optim.quantized(ADAM).update(
            random(0), optim.quantized(optax.trace(0.9)).init(random(0))
        ),
        r"has \['state'\], but this transformation expected \['0'\]",
    ),
    "other parameters": (
        lambda: optim.quantized(ADAM).update(
            zeros(random(0)),
            optim.quantized(ADAM).init(jax.tree.map(lambda x: x[:8], random(0))),
        ),
        "'embed': state of",
    ),
    "lists below": (
        lambda: optim.quantized(
            optax.sm3(0.1), slots={"mu": "signed", "nu": "unsigned"}
        ).init(random(0)),
        "not a tree like the parameters: write slots={'mu': 'kept'}",
    ),
    "optax of others": (
        lambda: optim.from_optax(
            optim.quantized(ADAM).init(random(0)), optax.trace(0.9).init(random(0))
        ),
        "the optax state has no '0/mu/embed'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_says_what_to_write(name: str) -> None:
    call, said = WRONG[name]
    with pytest.raises(ValueError, match=f"(?s){said}"):
        call()


def test_moments_without_names_take_roles() -> None:
    tx = optim.quantized(
        two_moments(), slots={"moment0": "relative", "moment1": "unsigned bf16"}
    )
    state = tx.init(random(0))
    assert list(state.moments["state"].extra["format"]) == [
        "moment0=ratio8,moment1=bf16"
    ]
    theirs = optim.to_optax(state, two_moments().init(random(0)))
    again = optim.from_optax(state, theirs)
    assert_same_bits(again, state)
