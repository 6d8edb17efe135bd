"""The moments in a `state_dict` of bitsandbytes' or torch's optimizers, as numpy."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .kinds import SIGNED, Kind, kinds_of

_NESTED = "__bnb_optimizer_quant_state__"  # from bitsandbytes 0.49.2 on
_BLOCK_SIZES = (256, 2048)  # from bitsandbytes 0.44 on, and before
_OF_BITSANDBYTES = {
    *("step", "state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2"),
    *("unorm_vec", "gnorm_vec"),  # norms, for clipping
}
Arrays = dict[str, np.ndarray]


class Moment(NamedTuple):
    """One moment of one parameter.

    Attributes:
      values: codes, or the moment itself.
      book: what each code stands for; None: there are no codes.
      scales: of the blocks of codes, in the order of the flat moment.
    """

    values: np.ndarray
    book: np.ndarray | None = None
    scales: np.ndarray | None = None

    def decoded(self) -> np.ndarray:
        """The moment, float32."""
        if self.book is None or self.scales is None:
            return self.values.astype(np.float32)
        n = self.values.size
        size = next(b for b in _BLOCK_SIZES if len(self.scales) == -(-n // b))
        scales = np.repeat(self.scales, size)[:n].reshape(self.values.shape)
        return self.book[self.values] * scales


class Saved(NamedTuple):
    """What a `state_dict` has of one parameter.

    Attributes:
      key: its number; or its name, where that stands for it.
      name: its name, or its number as text.
      step: steps taken; None: they are not counted.
      moments: by their saved names; none: it never had a gradient.
      kinds: what may have written them.
    """

    key: int | str
    name: str
    step: int | None = None
    moments: Mapping[str, Moment] = {}
    kinds: tuple[Kind, ...] = ()

    def __str__(self) -> str:
        return f"state_dict['state'][{self.key!r}]" + (
            "" if self.name == str(self.key) else f" ({self.name})"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter, as torch has it."""
        return next(iter(self.moments.values())).values.shape

    def decoded(self, kind: Kind) -> Arrays:
        """The moments under the names that a kind gives them, float32.

        Raises:
          ValueError: for numbers that no run can have.
        """
        found = {k: self.moments[saved].decoded() for k, saved in kind.moments.items()}
        for k, x in found.items():
            if not np.isfinite(x).all():
                raise ValueError(f"{self}: {kind.moments[k]} is not finite everywhere")
            if k not in SIGNED and (x < 0).any():
                raise ValueError(
                    f"{self}: {kind.moments[k]} has values below 0, but "
                    f"{kind.writer}, whose hyperparameters its group has, keeps "
                    "squares in it"
                )
        if "variance" in found:
            centered = found["variance"] - np.square(found["mu"])
            found["variance"] = np.maximum(centered, 0)
        return found


def read(state_dict: Any, names: Sequence[str] | None = None) -> list[Saved]:
    """What a `state_dict` has of each parameter, in the order of its groups, checked.

    Args:
      state_dict: of an optimizer of bitsandbytes or torch.
      names: of the parameters, in that order. None: those in the groups, if any.

    Raises:
      ValueError: where something is missing, or of a shape that does not fit.
    """
    for field in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or field not in state_dict:
            has = list(state_dict) if isinstance(state_dict, Mapping) else state_dict
            raise ValueError(
                f"no {field!r} in the state_dict, but {str(has)[:80]}: give what "
                "optimizer.state_dict() of torch returned"
            )
    found = _parameters(state_dict["param_groups"])
    extra = set(state_dict["state"]) - {key for key, _, _ in found}
    if extra:
        raise ValueError(
            f"state_dict['state'] has {sorted(map(str, extra))[0]!r}, which is in none "
            "of its param_groups: give both as they were saved"
        )
    if names is None:
        names = [name for _, name, _ in found]
    if len(names) != len(found) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(names)} names, {len(set(names))} of them different, for a "
            f"state_dict of {len(found)} parameters: give the name of each, in the "
            "order of its param_groups"
        )
    pairs = zip(found, names, strict=True)
    return [
        _saved(state_dict["state"], k, name, group) for (k, _, group), name in pairs
    ]


def _parameters(groups: Any) -> list[tuple[int | str, str, Any]]:
    """The key, the name and the group of each parameter."""
    found = []
    for n, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"state_dict['param_groups'][{n}] has no 'params'")
        own = group.get("param_names") or [str(key) for key in group["params"]]
        found += [(k, x, group) for k, x in zip(group["params"], own, strict=True)]
    return found


def _saved(state: Any, key: int | str, name: str, group: Any) -> Saved:
    """One parameter."""
    entry = dict(state.get(key, {}))
    entry |= entry.pop(_NESTED, {})
    try:
        arrays = {k: _array(x) for k, x in entry.items() if x is not None}
        moments = _moments(arrays)
        if not moments:
            return Saved(key, name)
        kinds = kinds_of(moments, group)
        shapes = {k: moment.values.shape for k, moment in moments.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"its moments have shapes {shapes}, which should be one")
        step = int(arrays["step"].item()) if "step" in arrays else None
        return Saved(key, name, step, moments, kinds)
    except ValueError as error:
        raise ValueError(f"{Saved(key, name)}: {error}") from None


def _array(x: Any) -> np.ndarray:
    """An array or a number, also of torch: from any device, of any type."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if "bfloat16" in str(x.dtype):  # which numpy does not have
            x = x.float()
    return np.asarray(x)


def _moments(arrays: Arrays) -> dict[str, Moment]:
    """The moments of a parameter, their codes checked against books and scales."""
    if not any(name in _OF_BITSANDBYTES - {"step"} for name in arrays):
        names = [name for name in arrays if name != "step"]
        return {k: Moment(_floating(k, arrays[k])) for k in names}
    unknown = sorted(set(arrays) - _OF_BITSANDBYTES)
    if unknown:
        raise ValueError(
            f"it has {', '.join(unknown)}, which states in blocks do not have: what "
            "block_wise=False wrote is not read"
        )
    for name in ("state1", "step"):
        if name not in arrays:
            raise ValueError(f"it has {', '.join(arrays)}, but no {name}")
    first, scales = arrays["state1"], arrays.get("absmax1")
    if "state2" not in arrays:
        return {"state1": _moment(arrays, 1, first, scales)}
    second = {"state2": _moment(arrays, 2, arrays["state2"], arrays.get("absmax2"))}
    if first.shape != (2, *arrays["state2"].shape):
        return {"state1": _moment(arrays, 1, first, scales)} | second
    # AdEMAMix' two first moments are one array.
    _check_rows(first, scales)
    rows = enumerate(
        zip(first, (None, None) if scales is None else scales, strict=True)
    )
    return {f"state1[{k}]": _moment(arrays, 1, x, s) for k, (x, s) in rows} | second


def _check_rows(values: np.ndarray, scales: np.ndarray | None) -> None:
    """Refuse what AdEMAMix in 8 bits leaves on GPUs."""
    if scales is None:
        return
    if scales.ndim != 2 or len(scales) != 2:
        raise ValueError(f"absmax1 of shape {scales.shape}, not (2, blocks)")
    # There the last scale is never written: all of the second row are one too early.
    if values[0].size % 256 and scales[1, -1:].sum() == 0:
        raise ValueError(
            f"AdEMAMix in 8 bits of {values[0].size} values, not a multiple of 256: "
            "on GPUs bitsandbytes writes the scale of m1's last block and that of "
            "m2's first to one place, so that one is lost. Map the leaf to None in "
            "name_map: it starts anew"
        )


def _moment(arrays: Arrays, number: int, values: np.ndarray, scales: Any) -> Moment:
    """A moment of bitsandbytes, in 8 or in 32 bits."""
    book = arrays.get(f"qmap{number}")
    if values.dtype != np.uint8:
        if scales is not None or book is not None:
            raise ValueError(
                f"state{number} is {values.dtype}, but beside a qmap or an absmax: "
                "8-bit states are uint8; was it cast?"
            )
        return Moment(_floating(f"state{number}", values))
    if book is None or scales is None:
        missing = f"qmap{number}" if book is None else f"absmax{number}"
        raise ValueError(f"state{number} has codes, but there is no {missing}")
    if book.shape != (256,):
        raise ValueError(f"qmap{number} of shape {book.shape}, but codes need (256,)")
    counts = [-(-values.size // size) for size in _BLOCK_SIZES]
    if scales.ndim != 1 or len(scales) not in counts:
        raise ValueError(
            f"absmax{number} of shape {scales.shape} for {values.size} codes: blocks "
            f"of 256 have {counts[0]} scales, blocks of 2048 have {counts[1]}"
        )
    return Moment(values, book.astype(np.float32), scales.astype(np.float32))


def _floating(name: str, values: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"{name} is {values.dtype}, but moments are floating")
    return values
