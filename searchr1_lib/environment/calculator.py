"""A calculator as a second tool, for questions such as "how many years lie between …"."""

from __future__ import annotations

import ast
import operator
from typing import Any

from ..records import Passage
from .base import Tool

#: No powers: a short text could then keep the machine busy for hours.
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class Calculator(Tool):
    """Works out ``+ - * /`` and brackets; the result is a passage with the sum as its title."""

    name = "calculator"
    usage = (
        "To work out a sum, write it between <calculator> and </calculator>, for example "
        "<calculator> 1932 - 1871 </calculator>; the result comes back as that of a search does."
    )

    def run(self, arguments: list[str], k: int) -> list:
        values = map(value_of, arguments)
        return [Passage("", a, str(v) if isinstance(v, int) else f"{v:.12g}") for a, v in zip(arguments, values)]


def value_of(text: str) -> float:
    """The value of an arithmetic expression.

    >>> value_of("(1932 - 1871) / 2")
    30.5

    Raises:
        ValueError: it is longer than 200 characters, or anything but numbers, + - * / and brackets.
        ZeroDivisionError: it divides by 0.
    """
    if len(text) > 200:
        raise ValueError("a sum has at most 200 characters")
    try:
        return _value(ast.parse(text.strip().replace("−", "-"), mode="eval").body)
    except (SyntaxError, TypeError, KeyError, AttributeError):
        raise ValueError(f"not a sum: {text!r}") from None


def _value(node: Any) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
