"""What the moments of optax's transformations are: their sign, and what divides them.

A role is what one writes in `slots=`; a moment of the table has it by its name.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from octavo.pallas_kernels import FORMATS, Slot

Role: TypeAlias = Literal[
    "relative", "signed", "slow", "unsigned", "largest", "root", "kept"
]

ROLES: Mapping[Role, str] = {
    "relative": "signed, and divided by the root of the unsigned one beside it",
    "signed": "signed, and not divided so",
    "slow": "as relative, with a decay of .999 and more",
    "unsigned": "never negative: a mean or a sum of squares",
    "largest": "never negative, and a maximum of such means",
    "root": "the root of an unsigned one: a mean or a maximum of magnitudes",
    "kept": "no moment, or one that 8 bits would spoil: left as it is",
}

_ROLES: Mapping[str, Role] = {role: role for role in ROLES}

# By the name of the field; where that says too little, by its class, too.
_NAMED: Mapping[str, Role] = {
    "mu": "relative",
    "m": "relative",
    "m1": "relative",
    "exp_avg": "relative",
    "m2": "slow",
    "grad_sum": "slow",
    "trace": "signed",
    "ema": "signed",
    "previous_gradient": "signed",
    "nu": "unsigned",
    "n": "unsigned",
    "exp_avg_sq": "unsigned",
    "sum_of_squares": "unsigned",
    "e_g": "unsigned",
    "e_x": "unsigned",
    "nu_max": "largest",
    "ScaleByAdanState.v": "relative",
    "ScaleByAdanState.g": "relative",
    # A Hessian's diagonal, as Hutchinson's estimator has it, may be negative.
    "SophiaState.nu": "signed",
    # One number for each leaf, or for each of its rows and columns.
    "ScaleByNovogradState.nu": "kept",
    "ScaleBySM3State.mu": "kept",
    "ScaleBySM3State.nu": "kept",
    "v_row": "kept",
    "v_col": "kept",
    "FactoredState.v": "kept",
    "found_nan": "kept",
    "projector": "kept",
    # nu - mu**2 is divided by: two errors of 8 bits can make it negative.
    "ScaleByRStdDevState.mu": "kept",
    "ScaleByRStdDevState.nu": "kept",
    "ScaleByRStdDevWithCountState.mu": "kept",
    "ScaleByRStdDevWithCountState.nu": "kept",
    # Sums without decay from which parameters are computed: errors would add up.
    "MadgradState.s": "kept",
    "MadgradState.grad_sum_sq": "kept",
    "COCOBState.cumulative_gradients": "kept",
    "COCOBState.scale": "kept",
    "COCOBState.subgradients": "kept",
    "COCOBState.reward": "kept",
    "acc_grads": "kept",
    # Step sizes, and signs.
    "step_sizes": "kept",
    "prev_updates": "kept",
    # Parameters.
    "z": "kept",
    "x0": "kept",
    "params0": "kept",
    "init_params": "kept",
    "init_particles": "kept",
    "cache": "kept",
}


class Moment(NamedTuple):
    """A moment of another transformation's state.

    Args:
      slot: what it is.
      form: the format that is asked for; None: the one of all moments.
    """

    slot: Slot
    form: str | None


class Field(NamedTuple):
    """A field of another transformation's state that is a tree like the parameters.

    Args:
      path: of the field.
      owner: the name of the class that has it; empty where it has none.
      name: of the slot.
    """

    path: tuple[str, ...]
    owner: str
    name: str

    @property
    def shown(self) -> str:
        """Its path, as text."""
        return "/".join(self.path) or "(the state itself)"


def roles_of(
    fields: Sequence[Field], given: Mapping[str, str | None]
) -> list[tuple[Role, str | None]]:
    """The role of each field, and the format that is asked for.

    Args:
      fields: of all parts of a state.
      given: the option `slots`.

    Raises:
      ValueError: for a field that has no role, and for a slot that does not exist.
    """
    names = {key for field in fields for key in (field.name, field.shown)}
    for name in given:
        if name not in names:
            known = ", ".join(repr(field.shown) for field in fields)
            raise ValueError(
                f"slots: the state has no moment {name!r}; its moments are {known}, "
                "by these paths or by their last names"
            )
    return [_role(field, given) for field in fields]


def _role(field: Field, given: Mapping[str, str | None]) -> tuple[Role, str | None]:
    words = given.get(field.shown, given.get(field.name, "")) or ""
    role: Role | None = None
    form = None
    for word in words.split():
        if word in FORMATS:
            form = word
        elif word in _ROLES:
            role = _ROLES[word]
        else:
            raise ValueError(
                f"slots={{{field.name!r}: {words!r}}}: {word!r} is no format "
                f"({', '.join(FORMATS)}) and no role ({', '.join(ROLES)})"
            )
    if role is None:
        by_class = _NAMED.get(f"{field.owner}.{field.name}")
        role = by_class or _NAMED.get(field.name)
    if role is None and form == "32bit":
        role = "kept"
    if role is None:
        raise ValueError(
            f"{field.shown!r} of the state is like the parameters, but its name does "
            f"not say what it is. Write slots={{{field.name!r}: 'signed'}}, or another "
            "role:\n" + "\n".join(f"  {word!r}: {what}" for word, what in ROLES.items())
        )
    return role, form


def moments_of(
    names: Sequence[str], roles: Sequence[tuple[Role, str | None]]
) -> tuple[Moment, ...]:
    """The moments of one part of a state, whose roles are not "kept"."""
    squares = [
        name
        for name, (role, _) in zip(names, roles, strict=True)
        if role in ("unsigned", "largest", "root")
    ]
    over = squares[0] if squares else None
    return tuple(
        Moment(_slot(name, role, over), form)
        for name, (role, form) in zip(names, roles, strict=True)
    )


def _slot(name: str, role: Role, over: str | None) -> Slot:
    if role in ("unsigned", "largest", "root"):
        nearest, kept = role == "largest", "root" if role == "root" else "same"
        return Slot(name, signed=False, nearest=nearest, in_optax=kept)
    over = None if role == "signed" else over
    return Slot(name, signed=True, relative_to=over, slow=role == "slow")
