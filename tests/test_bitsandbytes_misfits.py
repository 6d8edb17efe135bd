"""State_dicts of torch that do not fit: errors say what, where, and what to do."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest

from octavo import optim

from torch_states import B1, CASES, IN_ORDER, values, written


def changed(change: Callable[[Any, Any], Any], case: str = "adam") -> Any:
    """A state_dict after a change of its entry of the leaf `b/c`, or of its group."""
    state_dict, _ = written(CASES[case], nested=False)
    change(state_dict["state"][1], state_dict["param_groups"][0])
    return state_dict


def put(**arrays: Any) -> Callable[[Any, Any], None]:
    """Other arrays: functions of those that there are, or values; None: none."""

    def change(entry: Any, group: Any) -> None:
        for name, x in arrays.items():
            new = x(entry[name]) if callable(x) else x
            entry.pop(name, None)
            entry |= {} if new is None else {name: new}

    return change


def of_gpu(scales: np.ndarray) -> np.ndarray:
    """The second row begins one place too early, in the last of the first."""
    both = np.append(scales[0, :-1], scales[1])
    return np.append(both, np.float32(0)).reshape(scales.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(state1=None), "has step, .*, but no state1"),
        (put(step=None), "but no step"),
        (put(qmap1=None), "state1 has codes, but there is no qmap1"),
        (put(absmax2=None), "state2 has codes, but there is no absmax2"),
        (put(qmap1=lambda x: x[:255]), r"qmap1 of shape \(255,\)"),
        (put(absmax1=lambda x: x[:-1]), "absmax1 .*256 have 20 .*, .* 2048 have 3"),
        (put(state1=lambda x: x[:-1]), r"shapes .*\(99, 50\).*should be one"),
        (put(state1=np.float32), "state1 is float32, but beside a qmap"),
        (put(max1=1.0), "it has max1, which states in blocks do not"),
        (put(absmax1=lambda x: x * np.nan), "state1 is not finite everywhere"),
        (put(absmax2=lambda x: -x), "state2 has values below 0"),
        (lambda entry, group: group.pop("betas"), "group has no betas"),
        (lambda entry, group: group.update(betas=(0, 0, 0)), "those of .* AdEMAMix"),
    ],
)
def test_a_damaged_state_dict_is_refused(change: Any, message: str) -> None:
    tx, params = CASES["adam"].ours(), values(1)
    with pytest.raises(ValueError, match=message) as error:
        optim.from_bitsandbytes(changed(change), params, tx, IN_ORDER)
    if "group" not in message and "AdEMAMix" not in message:
        assert "state_dict['state'][1]" in str(error.value)


def test_scales_that_gpus_mix_up_are_refused() -> None:
    case = CASES["ademamix"]
    state_dict = changed(put(absmax1=of_gpu), "ademamix")
    tx, params = case.ours(state="32bit"), values(1)
    with pytest.raises(
        ValueError, match=r"\['state'\]\[1\].*5000 values.*Map the leaf"
    ):
        optim.from_bitsandbytes(state_dict, params, tx, IN_ORDER)
    del state_dict["state"][1]
    in_part = IN_ORDER | {"b/c": None}
    state = optim.from_bitsandbytes(state_dict, params, tx, in_part)
    assert not state.m2["b"]["c"].any()
    assert state.m2["a"].any()


OTHERS = {
    ("lion", "adam"): "Lion and has mu, but tx keeps mu, nu",
    ("adam", "lion"): "LAMB and has mu, nu, but tx keeps mu",
    ("sgd", "lion"): "SGD or LARS and has trace, but tx keeps mu",
    ("lion", "rmsprop"): "Lion and has mu, but tx keeps nu",
    ("rmsprop", "sgd"): "RMSprop and has nu, but tx keeps trace",
    ("adagrad", "rmsprop"): "Adagrad and has sum_of_squares, but tx keeps nu",
    ("ademamix", "adam"): "AdEMAMix and has m1, m2, nu, but tx keeps mu, nu",
}


@pytest.mark.parametrize(("saved", "wanted"), OTHERS)
def test_another_optimizer_is_refused(saved: str, wanted: str) -> None:
    state_dict, _ = written(CASES[saved])
    tx = CASES[wanted].ours()
    with pytest.raises(ValueError, match="'a': .*" + OTHERS[saved, wanted]):
        optim.from_bitsandbytes(state_dict, values(1), tx, IN_ORDER)


def test_momentum_in_other_units_is_refused() -> None:
    state_dict, _ = written(CASES["sgd"])
    for tx, kept in (
        (optim.lars(0.1), "trace times the learning rate"),
        (optim.lars(0.1, learning_rate_first=False), "trace times the ratio"),
    ):
        with pytest.raises(ValueError, match=f"keeps {kept}: .*lars-bitsandbytes"):
            optim.from_bitsandbytes(state_dict, values(1), tx, IN_ORDER)
    limited = optim.preset("lars-bitsandbytes", 0.1, state="32bit")
    state = optim.from_bitsandbytes(state_dict, values(1), limited, IN_ORDER)
    assert state.trace["a"].any()


def test_dampening_that_bitsandbytes_ignores_is_not_lion() -> None:
    state_dict, _ = written(CASES["sgd"])
    state_dict["param_groups"][0]["betas"] = (B1, 0.1)
    tx = CASES["sgd"].ours()
    optim.from_bitsandbytes(state_dict, values(1), tx, IN_ORDER)


def transposed(x: np.ndarray) -> np.ndarray:
    """What a leaf is not."""
    return x.T


@pytest.mark.parametrize(
    ("name_map", "message"),
    [
        (None, "'a': the state_dict has no parameter 'a', but 0, 1, 2: .*names="),
        (IN_ORDER | {"b/d": 3}, "'b/d': .* no parameter 3"),
        (IN_ORDER | {"b/x": 1}, r"name_map has 'b/x', but .*\['b/"),
        (IN_ORDER | {"b/d": None}, r"1 parameters .* no leaf, such as .*\[2\]"),
        (IN_ORDER | {"a": 1}, r"'a' has shape \(64, 80\), but .*\[1\] \(100, 50\)"),
        (IN_ORDER | {"a": (0, transposed)}, r"'a' has .* made \(80, 64\)"),
    ],
)
def test_a_name_map_that_does_not_fit_is_refused(name_map: Any, message: str) -> None:
    state_dict, _ = written(CASES["lion"])
    with pytest.raises(ValueError, match=message):
        optim.from_bitsandbytes(state_dict, values(1), CASES["lion"].ours(), name_map)


def test_other_inputs_that_are_refused() -> None:
    tx, params = CASES["lion"].ours(), values(1)
    state_dict, _ = written(CASES["lion"])
    turned = params | {"a": params["a"].T}

    def refuses(message: str, *args: Any, tx: Any = tx, params: Any = params) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            optim.from_bitsandbytes(args[0], params, tx, IN_ORDER, *args[1:])

    refuses("no 'state' in the state_dict, but []", {})
    refuses("no 'param_groups' in the state_dict", {"state": {}})
    refuses("2 names, 2 of them different, for a state_dict of 3", state_dict, "ab")
    refuses("3 names, 2 of them different", state_dict, "aba")
    refuses("tx is no optimizer of Octavo", state_dict, tx=optax.lion(0.1))
    refuses("{'a': (0, np.transpose)}", state_dict, params=turned)
    refuses("count=1.0 must be an int", state_dict, None, 1.0)
    refuses("[0] has no 'params'", state_dict | {"param_groups": [{}]})
    groups = [state_dict["param_groups"][0] | {"params": [0, 1]}]
    refuses("has '2', which is in none of", state_dict | {"param_groups": groups})
    del state_dict["state"][1]
    refuses("'b/c': state_dict['state'][1] has no moments", state_dict)


def test_different_counts_need_an_argument() -> None:
    tx, params = CASES["adam"].ours(), values(1)
    state_dict = changed(put(step=np.float32(4.0)))
    with pytest.raises(
        ValueError, match=r"steps taken: 5 of .*, 4 of .*\[1\]; .*count="
    ):
        optim.from_bitsandbytes(state_dict, params, tx, IN_ORDER)
    state = optim.from_bitsandbytes(state_dict, params, tx, IN_ORDER, count=5)
    assert state.count == 5
