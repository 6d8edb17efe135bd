"""docs/coming_from.md: the calls there and here are the same, and do the same."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
import pytest
from calls import CLOSE, GRADS, START, ours, same, stepped

from octavo import optim, schedules
from octavo.optim.words import TORCH_DEFAULTS

PAGE = Path(__file__).parents[1] / "docs" / "coming_from.md"


class Row(NamedTuple):
    """A row of the page's tables: the call there, and here."""

    there: str
    here: str

    @property
    def library(self) -> str:
        return re.search(r"bnb|torchao|torch|braintools|optax", self.there)[0]  # type: ignore[index]

    @property
    def pasted(self) -> str:
        """The call there with the name changed, and without parameters."""
        match = re.fullmatch(r"\w+\.optim\.(\w+)\((?:params, )?(.*)\)", self.there)
        assert match is not None, self.there
        name = match[1].lower().replace("paged", "paged_")
        return f"optim.{name}({match[2]})"


ROWS = [
    Row(*match)
    for line in PAGE.read_text().splitlines()
    for match in re.findall(r"^\| `([^`]*\(.*?)` \| `([^`]*)` \|", line)
]
# Where the page says that numbers differ; what warns on a CPU, and is AdamW8bit.
DIFFERENT = re.compile(r"NAdam|LAMB|LARS|mu_dtype|amsgrad=True|Paged")
# Where it says that the call has to be another one.
REWRITTEN = re.compile(r"Adam\w*\(.*weight_decay|LAMB|LARS|Lamb|Lars|optim\.Adam\(p")


@pytest.fixture(scope="module")
def here() -> dict[str, dict[str, np.ndarray]]:
    """What Octavo's calls on the page do, by call."""
    calls = sorted({row.here for row in ROWS})
    return dict(zip(calls, stepped([ours(call) for call in calls]), strict=True))


def test_the_page_has_rows_of_every_library() -> None:
    counted = {row.library for row in ROWS}
    assert counted == {"bnb", "torch", "torchao", "braintools", "optax"}
    assert len(ROWS) > 40


@pytest.mark.parametrize(
    "row",
    [x for x in ROWS if x.library != "optax" and not REWRITTEN.search(x.there)],
    ids=lambda row: row.there,
)
def test_a_pasted_call_is_the_one_beside_it(row: Row) -> None:
    same(ours(row.pasted), ours(row.here))


def test_calls_of_optax_do_what_optax_does(
    here: dict[str, dict[str, np.ndarray]],
) -> None:
    rows = [x for x in ROWS if x.library == "optax" and not DIFFERENT.search(x.there)]
    for row, theirs in zip(
        rows, stepped([ours(row.there) for row in rows]), strict=True
    ):
        for leaf in START:
            np.testing.assert_allclose(
                here[row.here][leaf], theirs[leaf], **CLOSE, err_msg=row.there
            )


@pytest.mark.parametrize(
    "row",
    [
        x
        for x in ROWS
        if x.library in ("torch", "bnb") and not DIFFERENT.search(x.there)
    ],
    ids=lambda row: row.there,
)
def test_calls_of_torch_do_what_torch_does(
    row: Row, here: dict[str, dict[str, np.ndarray]]
) -> None:
    torch = pytest.importorskip("torch")
    known = {"torch": torch}
    if row.library == "bnb":
        known["bnb"] = pytest.importorskip("bitsandbytes")
    theirs = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in START.items()}
    optimizer = eval(row.there, {**known, "params": list(theirs.values())})
    for grads in GRADS:
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        optimizer.step()
    for name, p in theirs.items():
        np.testing.assert_allclose(here[row.here][name], p.detach().numpy(), **CLOSE)


# ---------------------------------------------------------- defaults of torch's words


def adam_numbers(
    g: np.ndarray, state: dict[str, Any], t: int, b1: float = 0.9, b2: float = 0.999
) -> np.ndarray:
    """The step of Adam, whose moments `state` keeps."""
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
    m, v = state["m"] / (1 - b1**t), state["v"] / (1 - b2**t)
    return m / (np.sqrt(v) + 1e-8)


def adamw_step(p: Any, g: Any, state: dict[str, Any], t: int) -> Any:
    return p - 1e-3 * (adam_numbers(g, state, t) + 0.01 * p)


def adam_step(p: Any, g: Any, state: dict[str, Any], t: int) -> Any:
    return p - 1e-3 * adam_numbers(g, state, t)


def adamax_step(p: Any, g: Any, state: dict[str, Any], t: int) -> Any:
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    state["n"] = np.maximum(0.999 * state.get("n", 0.0), np.abs(g) + 1e-8)
    return p - 2e-3 / (1 - 0.9**t) * state["m"] / state["n"]


def ademamix_step(p: Any, g: Any, state: dict[str, Any], t: int) -> Any:
    state["slow"] = 0.9999 * state.get("slow", 0.0) + 1e-4 * g
    fast = adam_numbers(g, state, t)
    slow = state["slow"] / (np.sqrt(state["v"] / (1 - 0.999**t)) + 1e-8)
    return p - 1e-3 * (fast + 5 * slow + 0.01 * p)


def lion_step(p: Any, g: Any, state: dict[str, Any], t: int) -> Any:
    m = state.get("m", 0.0)
    state["m"] = 0.99 * m + 0.01 * g
    return p - 1e-4 * np.sign(0.9 * m + 0.1 * g)


def sgd_step(p: Any, g: Any, state: dict[str, Any], t: int) -> Any:
    return p - 1e-3 * g


def rmsprop_step(p: Any, g: Any, state: dict[str, Any], t: int) -> Any:
    state["v"] = 0.99 * state.get("v", 0.0) + 0.01 * g * g
    return p - 1e-2 * g / (np.sqrt(state["v"]) + 1e-8)


def adagrad_step(p: Any, g: Any, state: dict[str, Any], t: int) -> Any:
    state["v"] = state.get("v", 0.0) + g * g
    return p - 1e-2 * g / (np.sqrt(state["v"]) + 1e-10)


def lars_step(p: Any, g: Any, state: dict[str, Any], t: int) -> Any:
    ratio = 1e-3 * np.linalg.norm(p) / (np.linalg.norm(g) + 1e-8)
    state["m"] = 0.9 * state.get("m", 0.0) + ratio * g
    return p - 0.1 * state["m"]


STEPS: dict[str, Callable[..., Any]] = {
    "adam(lr=1e-3)": adam_step,
    "adam(foreach=True)": adam_step,
    "adamw(lr=1e-3)": adamw_step,
    "adamw8bit(betas=(0.9, 0.999))": adamw_step,
    "adamax(fused=False)": adamax_step,
    "ademamix(betas=(0.9, 0.999, 0.9999))": ademamix_step,
    "lion8bit(betas=(0.9, 0.99))": lion_step,
    "sgd(fused=True)": sgd_step,
    "rmsprop(lr=1e-2)": rmsprop_step,
    "rmsprop(rho=0.99)": rmsprop_step,
    "adagrad(fused=True)": adagrad_step,
    "lars(lr=0.1)": lars_step,
}


def test_a_call_in_torchs_words_has_torchs_defaults() -> None:
    results = stepped([ours(f"optim.{call}") for call in STEPS])
    for (call, step), result in zip(STEPS.items(), results, strict=True):
        p, state = START["kernel"].astype(np.float64), {}
        for t, g in enumerate(GRADS, 1):
            p = step(p, g["kernel"].astype(np.float64), state, t)
        np.testing.assert_allclose(result["kernel"], p, **CLOSE, err_msg=call)


def test_lars_in_torchs_words_is_braintools() -> None:
    same(optim.lars(lr=0.1), optim.preset("lars-braintools", 0.1))


def test_rates_that_are_left_out() -> None:
    same(optim.amsgrad(betas=(0.9, 0.999)), optim.amsgrad(1e-3))
    same(optim.lamb(betas=(0.9, 0.999)), optim.lamb(1e-3))
    same(optim.nadam(betas=(0.9, 0.999)), optim.nadam(2e-3))
    same(optim.nadamw(betas=(0.9, 0.999)), optim.nadamw(2e-3, weight_decay=0.01))


def test_the_table_of_defaults_is_that_of_torch_and_bitsandbytes() -> None:
    torch = pytest.importorskip("torch").optim
    bnb = pytest.importorskip("bitsandbytes").optim
    here = {"lr": "learning_rate", "alpha": "decay"}
    for module, names in (
        (torch, ("Adam", "AdamW", "NAdam", "Adamax", "SGD", "RMSprop", "Adagrad")),
        (bnb, ("Adam", "AdamW", "Lion", "AdEMAMix", "LAMB", "RMSprop", "Adagrad")),
    ):
        for name in names:
            row = TORCH_DEFAULTS[name.lower()]
            parameters = inspect.signature(getattr(module, name)).parameters
            theirs = {here.get(key, key): p.default for key, p in parameters.items()}
            assert row.items() & theirs.items() == {
                (key, value) for key, value in row.items() if key in theirs
            }, name


def test_a_call_in_optax_words_has_optax_defaults() -> None:
    for name, row in TORCH_DEFAULTS.items():
        tx = getattr(optim, name)(1e-3).optimizer
        for argument in {"weight_decay", "decay", "eps", "eps_in_sqrt"} & set(row):
            numbers = vars(tx.hyperparameters)
            given = tx.weight_decay if argument == "weight_decay" else numbers[argument]
            function = getattr(optax, name, None) or getattr(optax.contrib, name)
            theirs = inspect.signature(function).parameters
            if argument in theirs:
                assert given == theirs[argument].default, (name, argument)


# ------------------------------------------------------------- braintools' page of Lamb

_SCHEDULE = schedules.PolynomialLR(
    base_lr=0.002, warmup_steps=1000, total_steps=10000, power=1.0
)
EXAMPLES: list[dict[str, Any]] = [
    {"lr": 0.002},
    {"lr": 0.01, "betas": (0.9, 0.999)},
    {"lr": _SCHEDULE},
    {"lr": 0.002, "weight_decay": 0.01},
    {"lr": 0.002, "grad_clip_norm": 1.0},
    {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.01},
]


def lamb_of_braintools(
    lr: Any,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    grad_clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """What its documentation describes, of optax' parts."""
    clip = optax.clip_by_global_norm(grad_clip_norm or np.inf)
    return optax.chain(
        optax.identity() if grad_clip_norm is None else clip,
        optax.scale_by_adam(*betas, eps=1e-6),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_trust_ratio(),
        optax.scale_by_learning_rate(lr),
    )


def test_the_examples_of_braintools_lamb_have_their_twins() -> None:
    pasted = [optim.lamb(**example) for example in EXAMPLES]
    presets = [
        optim.preset("lamb-braintools", example["lr"], **_without(example, "lr"))
        for example in EXAMPLES
    ]
    theirs = [lamb_of_braintools(**example) for example in EXAMPLES]
    results = stepped([*pasted, *presets, *theirs])
    for k, example in enumerate(EXAMPLES):
        mine, preset, expected = results[k :: len(EXAMPLES)]
        for leaf in START:
            np.testing.assert_allclose(
                preset[leaf], expected[leaf], **CLOSE, err_msg=str(example)
            )
        # The bias has no ratio in `optim.lamb`.
        np.testing.assert_allclose(mine["kernel"], expected["kernel"], **CLOSE)


def _without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != name}
