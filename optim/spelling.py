"""Calls in the words of others become calls in Octavo's, or errors that show them."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import Any

import jax
import numpy as np

from .checks import check_bool, check_learning_rate
from .words import (
    BETAS,
    OF_ARGS,
    ROUNDED,
    SAME,
    STATES,
    TORCH_DEFAULTS,
    TORCH_WORDS,
    word_of,
)


@dataclass(frozen=True)
class Callee:
    """An optimizer, as a call names it.

    Attributes:
      name: in the call, "adam8bit".
      optimizer: the function behind it, "adam".
      signature: what it takes.
      fixed: arguments that the name has set, {"state": "8bit"}.
    """

    name: str
    optimizer: str
    signature: Signature = field(repr=False)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> Mapping[str, Parameter]:
        """The arguments that it takes, in order."""
        return self.signature.parameters

    @property
    def takes_rate(self) -> bool:
        """Whether its first argument is the learning rate."""
        return next(iter(self.known), None) == "learning_rate"

    @property
    def defaults(self) -> dict[str, Any]:
        """What a call in torch's words means by the arguments that it leaves out."""
        stem = (
            self.name.removeprefix("paged_").removesuffix("8bit").removesuffix("32bit")
        )
        row = TORCH_DEFAULTS.get(stem, {})
        return {name: value for name, value in row.items() if name in self.known}

    def call(self, arguments: Mapping[str, Any], name: str | None = None) -> str:
        """The Python of a call, or of one of another name with all that is set."""
        if name is not None:
            arguments = {**self.fixed, **arguments}
        parts = []
        for key, value in ({"learning_rate": 1e-3} | {**arguments}).items():
            known = self.known.get(key)
            if key == "learning_rate":
                parts.insert(0, _text(value))
            elif known is None or not _is(value, (known.default,)):
                parts.append(f"{key}={_text(value)}")
        return f"optim.{name or self.name}({', '.join(parts)})"


def translated(
    callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call, by the names that Octavo has for them.

    A call with a word that only torch, bitsandbytes or torchao have was written for
    them: what it leaves out has their defaults.

    Raises:
      TypeError: for arguments that are given twice, or missing, and for parameters.
      ValueError: for words and values that mean nothing here.
    """
    has_params = "params" in kwargs or (callee.takes_rate and _are_params(args[:1]))
    if has_params:
        args, kwargs = (), _without_params(callee, args, kwargs)
    given = _Given.of(callee, _by_name(callee, args, kwargs))
    found = given.arguments
    if given.pasted or has_params:
        found = callee.defaults | found
    found = {name: found[name] for name in (*callee.known, *found) if name in found}
    for word, value in given.refused.items():
        _refuse(callee, word, value, found)
    _check_fixed(callee, found)
    _check_betas(callee, found)
    if has_params:
        raise TypeError(
            f"{callee.name} takes no parameters, but its `init` does. Write "
            f"tx = {callee.call(found)}; state = tx.init(params)"
        )
    if callee.takes_rate and "learning_rate" not in found:
        raise TypeError(
            f"{callee.name} needs a learning rate. Write {callee.call(found)}"
        )
    if callee.takes_rate:
        check_learning_rate(found["learning_rate"])
    return {name: x for name, x in found.items() if name not in callee.fixed}


def _are_params(first: Sequence[Any]) -> bool:
    """Whether parameters are where the learning rate should be."""
    if any(isinstance(x, Mapping | list | tuple | Iterator) for x in first):
        return True
    return any(np.ndim(leaf) > 0 for leaf in jax.tree.leaves(list(first)))


def _without_params(
    callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Torch's order: after parameters comes the rate, then perhaps the betas."""
    left = args if "params" in kwargs else args[1:]
    named = dict(zip(("lr", "betas"), left, strict=False))
    if not isinstance(named.get("betas"), tuple | list):
        named.pop("betas", None)
    if len(left) > len(named):
        parts = (f"{name}={_text(value)}" for name, value in named.items())
        raise TypeError(
            f"{callee.name} takes no parameters, but its `init` does. Write "
            f"tx = optim.{callee.name}({', '.join(parts)}, ...) with names for all "
            "that follows; state = tx.init(params)"
        )
    return named | {k: x for k, x in kwargs.items() if k != "params"}


def _by_name(
    callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    names = [p.name for p in callee.known.values() if p.kind is not p.KEYWORD_ONLY]
    if len(args) > len(names):
        raise TypeError(
            f"{callee.name} takes at most {len(names)} arguments without a name, "
            f"but {len(args)} were given"
        )
    words = dict(zip(names, args, strict=False))
    for name in words:
        if name in kwargs:
            raise TypeError(f"{callee.name}: {name} is given twice")
    words |= kwargs
    holder = words.get("args")
    if holder is not None:
        words |= {x: getattr(holder, x) for x in OF_ARGS if hasattr(holder, x)}
        if not words.get("max_unorm"):  # there 0 is no limit
            words.pop("max_unorm", None)
    return words


@dataclass
class _Given:
    """What is given by Octavo's names, what is refused, and if it is torch's call."""

    arguments: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, Any] = field(default_factory=dict)
    pasted: bool = False

    @classmethod
    def of(cls, callee: Callee, words: Mapping[str, Any]) -> "_Given":
        made, origin = cls(), {}
        for word, value in words.items():
            for name, x in made._read(callee, word, value).items():
                if name in origin:
                    raise TypeError(
                        f"{callee.name}: {origin[name]} and {word} are the same. Write "
                        "one of them"
                    )
                origin[name], made.arguments[name] = word, x
        return made

    def _read(self, callee: Callee, word: str, value: Any) -> dict[str, Any]:
        """An argument by Octavo's names; nothing if it asks for nothing."""
        if word in callee.known or word in callee.fixed:
            return {word: value}
        known = word_of(callee.optimizer, word)
        same = _same(callee, word, value)
        self.pasted |= bool(same) or word in TORCH_WORDS
        if known is None:
            return same or {word: value}  # the options' check says what there is
        if known.harmless is not ... and not _is(value, known.harmless):
            self.refused[word] = value
        return {}


def _same(callee: Callee, word: str, value: Any) -> dict[str, Any]:
    """The same by other names, if there are such."""
    if SAME.get(word) in callee.known:
        return {SAME[word]: value}
    if word == "optim_bits":
        if not _is(value, tuple(STATES)):
            raise ValueError(f"optim_bits={_text(value)} must be 8 or 32")
        return {} if value is None else {"state": STATES[value]}
    if word == "bf16_stochastic_round" and value is not None:
        check_bool(bf16_stochastic_round=value)
        return {"weights": ROUNDED[bool(value)]}
    names = [name for name in BETAS if name in callee.known]
    if word != "betas" or not names:
        return {}
    if isinstance(value, str) or not isinstance(value, Sequence):
        value = (value,)
    if len(value) != len(names):
        usual = tuple(callee.known[name].default for name in names)
        raise ValueError(
            f"betas={_text(value)} must be {len(names)} numbers. Write "
            f"{callee.call({'betas': usual})}"
        )
    return dict(zip(names, value, strict=True))


def _is(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether it is None, or plain and one of these."""
    plain = isinstance(value, bool | int | float | str | np.generic)
    return value is None or (plain and value in harmless)


def _refuse(callee: Callee, word: str, value: Any, found: Mapping[str, Any]) -> None:
    """Raise ValueError for a word whose value asks for something."""
    known = word_of(callee.optimizer, word)
    assert known is not None
    decayed = {**found, "weight_decay": value}
    twin = callee.name.replace("adam", "adamw")
    decoupled = callee.call(decayed, name="adamw")
    if twin != callee.name:  # unlike AMSGrad, it has a name with decay
        decoupled = callee.call(decayed).replace(callee.name, twin)
    instead = known.instead.format(
        call=callee.call(found), decoupled=decoupled, value=_text(value)
    )
    raise ValueError(f"{word}={_text(value)}: {known.reason}. Write {instead}")


def _check_fixed(callee: Callee, found: Mapping[str, Any]) -> None:
    """Raise ValueError for another value of what the name has set."""
    for name, fixed in callee.fixed.items():
        if name in found and found[name] is not None and found[name] != fixed:
            raise ValueError(
                f"{callee.name} has {name}={fixed!r}, not {_text(found[name])}. Write "
                f"{callee.call(found, name=callee.optimizer)}"
            )


def _check_betas(callee: Callee, found: Mapping[str, Any]) -> None:
    """Raise ValueError for torch's pair in the place of b1."""
    betas = found.get("b1")
    if not isinstance(betas, tuple | list):
        return
    left = {name: x for name, x in found.items() if name not in BETAS}
    if "b2" in found:  # what follows has torch's order, too
        left = {name: left[name] for name in left if name == "learning_rate"}
    call = callee.call(left | {"betas": betas})
    raise ValueError(f"b1={_text(betas)} must be a number in [0, 1). Write {call}")


def _text(value: Any) -> str:
    """As Python writes it, where that is short."""
    text = repr(value)
    return text if len(text) <= 60 and " at 0x" not in text else "..."


def absent(module: str, name: str, names: Iterable[str]) -> str:
    """What to say of a name that a module does not have."""
    message, names = f"module {module!r} has no attribute {name!r}", list(names)
    if name.startswith("_"):
        return message
    plain = name.lower().replace("_", "")
    unpaged = plain.removeprefix("paged")
    stem = unpaged.removesuffix("8bit").removesuffix("32bit")
    if stem in TORCH_DEFAULTS and unpaged in names:
        own, paged = f"paged_{unpaged}", unpaged != plain
        call = own if paged and own in names else unpaged
        option = ", paged=True" if paged and own not in names else ""
        return (
            f"{message}. Write tx = optim.{call}(1e-3{option}); state = tx.init(params)"
        )
    longer = sorted((x for x in names if x.startswith(plain)), key=len)
    alike = difflib.get_close_matches(unpaged, names, n=1)
    meant = next(iter([*longer, *alike]), None)
    return message if meant is None else f"{message}: did you mean {meant!r}?"
