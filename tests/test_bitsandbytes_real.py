"""States of bitsandbytes and torch themselves, where they are installed: on the CPU.

After some steps of theirs the state is converted, and the next step is taken twice.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim

from bits import assert_same_bits

LR, B1, B2, B3 = 2.0**-7, 0.875, 0.9375, 0.96875  # exact in float32
# 8 bits, 8 bits with a last block that is not full, and too small for 8 bits.
SHAPES = [(64, 80), (100, 50), (37,)]


@pytest.fixture
def torch() -> Any:
    """torch, if it is installed."""
    return pytest.importorskip("torch")


@pytest.fixture
def bitsandbytes(torch: Any) -> Any:
    """bitsandbytes, whose import warns of what its CPU build lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def gradients(steps: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Of each step and leaf."""
    rng = np.random.default_rng(seed)
    return [[np.float32(rng.standard_normal(s)) for s in SHAPES] for _ in range(steps)]


class Case(NamedTuple):
    """An optimizer there, by name and arguments, and ours."""

    theirs: str
    arguments: dict[str, Any]
    ours: Callable[..., Any]


ADAM = {"lr": LR, "betas": (B1, B2), "eps": 1e-6}
AVERAGE = {"lr": LR, "alpha": B2, "eps": 1e-6}
DECAY = {"weight_decay": 0.5}


def adamw(**options: Any) -> Any:
    return optim.adamw(LR, B1, B2, 1e-6, 0.5, **options)


def ademamix(**options: Any) -> Any:
    return optim.ademamix(LR, B1, B2, B3, 4.0, 1e-6, 0.5, **options)


def lion(**options: Any) -> Any:
    return optim.lion(LR, B1, B2, 0.5, **options)


def sgd(**options: Any) -> Any:
    return optim.sgd(LR, B1, weight_decay=0.5, **options)


def lars(**options: Any) -> Any:
    return optim.preset(
        "lars-bitsandbytes",
        LR,
        momentum=B1,
        weight_decay=0.5,
        max_unorm=64.0,  # in place of 0.02: of parameters that are as small as steps
        **options,
    )


def rmsprop(**options: Any) -> Any:
    return optim.rmsprop(
        LR, B2, 1e-6, eps_in_sqrt=False, learning_rate_first=False, **options
    )


def adagrad(**options: Any) -> Any:
    return optim.adagrad(LR, 0.0, 1e-6, eps_in_sqrt=False, **options)


MIX = ADAM | DECAY | {"betas": (B1, B2, B3), "alpha": 4.0}
BITSANDBYTES = [
    Case("AdamW8bit", ADAM | DECAY, adamw),
    Case("AdamW", ADAM | DECAY, adamw),
    Case("PagedAdamW8bit", ADAM | DECAY, adamw),
    Case("AdEMAMix8bit", MIX, ademamix),
    Case("AdEMAMix", MIX, ademamix),
    Case("Lion8bit", {"lr": LR, "betas": (B1, B2)} | DECAY, lion),
    Case("SGD8bit", {"lr": LR, "momentum": B1} | DECAY, sgd),
    Case("LARS", {"lr": LR, "momentum": B1, "max_unorm": 64.0} | DECAY, lars),
    Case("RMSprop8bit", AVERAGE, rmsprop),
    Case("Adagrad8bit", {"lr": LR, "eps": 1e-6}, adagrad),
    # Without its bound, which on CPUs is of another norm than on GPUs and here.
    Case("LAMB", ADAM | DECAY | {"max_unorm": 0.0}, adamw),
]
TORCH = [
    Case("Adam", ADAM, lambda **o: optim.adam(LR, B1, B2, 1e-6, **o)),
    Case("AdamW", ADAM | DECAY, adamw),
    Case("Adamax", ADAM, lambda **o: optim.adamax(LR, B1, B2, 1e-6, **o)),
    Case("SGD", {"lr": LR, "momentum": B1} | DECAY, sgd),
    Case("RMSprop", AVERAGE, rmsprop),
    Case(
        "RMSprop",
        AVERAGE | {"centered": True, "momentum": B1},
        lambda **o: rmsprop(centered=True, momentum=B1, **o),
    ),
    Case("Adagrad", {"lr": LR, "eps": 1e-6}, adagrad),
]


def named(case: Case) -> str:
    return f"{case.theirs}{'-centered' if 'centered' in case.arguments else ''}"


class Run:
    """An optimizer of torch and its parameters, which it changes."""

    def __init__(self, torch: Any, make: Callable[..., Any], case: Case) -> None:
        self.torch = torch
        rng = np.random.default_rng(9)
        start = [np.float32(LR * rng.standard_normal(s)) for s in SHAPES]
        self.leaves = [torch.nn.Parameter(torch.tensor(x)) for x in start]
        self.optimizer = make(self.leaves, **case.arguments)

    def step(self, grads: list[np.ndarray]) -> None:
        for leaf, g in zip(self.leaves, grads, strict=True):
            leaf.grad = self.torch.tensor(g)
        self.optimizer.step()

    @property
    def params(self) -> list[np.ndarray]:
        return [leaf.detach().numpy().copy() for leaf in self.leaves]

    def saved(self) -> Any:
        """The state_dict, there and back through a file."""
        file = io.BytesIO()
        self.torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return self.torch.load(file, weights_only=True)


def check_next_step(run: Run, case: Case) -> None:
    """Four steps of theirs, and the fifth from the same state in both."""
    *before, last = gradients(5)
    for grads in before:
        run.step(grads)
    params = [jnp.asarray(p) for p in run.params]
    tx = case.ours(state="32bit")
    # torch's SGD does not count its steps.
    state = optim.from_bitsandbytes(run.saved(), params, tx, count=4)
    run.step(last)
    got, _ = jax.jit(tx.step)([jnp.asarray(g) for g in last], state, params)
    for p, x, y in zip(params, got, run.params, strict=True):
        # Some 10 roundings on either side, of values up to the largest step or
        # parameter. (The largest error here is that of 2.1.)
        largest = max(np.abs(y - p).max(), np.abs(p).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=20 * 2.0**-24 * largest)
        assert np.abs(y - p).max() > LR / 2  # far above


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("case", BITSANDBYTES, ids=named)
def test_the_next_step_is_that_of_bitsandbytes(
    torch: Any, bitsandbytes: Any, case: Case
) -> None:
    check_next_step(Run(torch, getattr(bitsandbytes.optim, case.theirs), case), case)


@pytest.mark.parametrize("case", TORCH, ids=named)
def test_the_next_step_is_that_of_torch(torch: Any, case: Case) -> None:
    check_next_step(Run(torch, getattr(torch.optim, case.theirs), case), case)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_values_are_those_that_bitsandbytes_decodes(
    torch: Any, bitsandbytes: Any, name: str
) -> None:
    (case,) = (case for case in BITSANDBYTES if case.theirs == name)
    run = Run(torch, getattr(bitsandbytes.optim, name), case)
    for grads in gradients(3):
        run.step(grads)
    params = [jnp.asarray(p) for p in run.params]
    state = optim.from_bitsandbytes(run.saved(), params, case.ours(state="32bit"))
    assert state.count == 3
    decode = bitsandbytes.functional.dequantize_blockwise
    for n, slot in enumerate(state.slots, 1):
        for got, leaf in zip(getattr(state, slot), run.leaves, strict=True):
            saved = run.optimizer.state[leaf]
            expected = saved[f"state{n}"]
            if expected.dtype == torch.uint8:
                kept = {"absmax": f"absmax{n}", "code": f"qmap{n}"}
                arrays = {k: saved[name] for k, name in kept.items()}
                expected = decode(expected, **arrays, blocksize=256)
            assert_same_bits(np.asarray(got), expected.numpy())


def test_names_of_a_module_and_bfloat16(torch: Any) -> None:
    """torch keeps the names that it gets, and moments of the parameters' type."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 3))
    model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.ones(2, 5, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    like = {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
    params = {"0": like | {"kernel": jnp.zeros((5, 3))}, "1": like}

    def torch_name(path: str) -> Any:
        name = path.replace("/", ".")
        if path.endswith("bias"):
            return name
        return name.replace("kernel", "weight"), np.transpose

    tx = optim.adamw(0.1, state="32bit")
    state = optim.from_bitsandbytes(optimizer.state_dict(), params, tx, torch_name)
    kept = optimizer.state[model[1].weight]["exp_avg"]
    assert kept.dtype == torch.bfloat16
    expected = kept.float().numpy().T
    assert_same_bits(
        np.asarray(state.mu["1"]["kernel"]), np.ascontiguousarray(expected)
    )
    assert state.nu["0"]["kernel"].any()


def test_torch_that_keeps_something_else_is_refused(torch: Any) -> None:
    """Maximum before the correction of its bias; a momentum that is scheduled."""
    refused = {
        "Adam": ({"amsgrad": True}, "biased nu_max"),
        "NAdam": ({}, "mu_product.*does not know"),
        "Adadelta": ({}, "acc_delta.*does not know"),
    }
    for name, (arguments, message) in refused.items():
        case = Case(name, arguments, optim.adam)
        run = Run(torch, getattr(torch.optim, name), case)
        run.step(gradients(1)[0])
        params = [jnp.asarray(p) for p in run.params]
        with pytest.raises(ValueError, match=message):
            optim.from_bitsandbytes(run.saved(), params, optim.adam(LR, state="32bit"))
