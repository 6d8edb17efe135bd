"""Schedules written as text: names of classes and literals, and nothing else."""

import ast
from typing import Any

from .base import Schedule, build, schedule_class

# Far above any schedule, and far below what exhausts the parser.
_LONGEST = 10_000


def parse(text: str) -> Schedule:
    """The schedule that ``text`` writes as a constructor call.

    Nothing is evaluated: names have to be those of schedule classes, arguments
    numbers, strings, True, False, None, lists, or schedules again.

    Args:
        text: what ``repr`` of a schedule shows, at most 10,000 characters.

    Raises:
        ValueError: anything else, or arguments that the class refuses.

    Example:
        >>> from octavo import schedules
        >>> schedules.parse("StepLR(0.1, step_size=30)")
        StepLR(base_lr=0.1, step_size=30)
    """
    if len(text) > _LONGEST:
        raise ValueError(
            f"a schedule of {len(text)} characters; {_LONGEST} are allowed"
        )
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read {text!r}: {error}") from None
    result = _value(tree.body)
    if isinstance(result, Schedule):
        return result
    raise ValueError(f"{text!r} is not a schedule; write StepLR(0.1, step_size=30)")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return _construct(name, node)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -ast.literal_eval(node.operand)
        case ast.Constant(value=int() | float() | str() | None):
            return node.value
    raise ValueError(
        f"{ast.unparse(node)!r} is not allowed in a schedule; write numbers, strings, "
        "lists, and schedules by name"
    )


def _construct(name: str, call: ast.Call) -> Schedule:
    kwargs = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("** is not allowed in a schedule; write each argument")
        kwargs[keyword.arg] = _value(keyword.value)
    return build(schedule_class(name), [_value(item) for item in call.args], kwargs)
