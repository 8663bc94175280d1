"""What a rollout may spend, and the base of all classes of named values whose types and ranges are checked.

A field's docstring is its description, in errors, in ``--help`` and for a reader. This loads neither torch nor
transformers, so that the suite can check a parameter in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

_LARGEST = 2**63 - 1  # what does not fit into a machine's whole number would fail deep inside
Whole = Annotated[int, Field(ge=0, le=_LARGEST)]
Count = Annotated[int, Field(ge=1, le=_LARGEST)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
#: Seconds to wait, at most a day: a thread cannot wait as long as a float can say.
Seconds = Annotated[float, Field(gt=0, le=86_400)]


def problem(item: Any, known: Iterable[str] = ()) -> str:
    """What pydantic found (one of ``ValidationError.errors()``): "temperature must be greater than 0, got nan".

    Args:
        known: the names that there are, for a hint at one that is not among them.
    """
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"{name} is missing"
    if item["type"] != "extra_forbidden":
        return f"{name} {item['msg'].replace('Input should', 'must')}, got {item['input']!r:.80}"
    near = get_close_matches(name, known)
    return f"unknown name {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}")


def valid(kind: Any, value: Any, name: str) -> Any:
    """The value of a parameter, if it is of this kind (``Share``, ``Count | None``, ...) and finite.

    Raises:
        ValueError: it is not; names the parameter and gives the value.
    """
    return check(**{name: (value, kind)})[name]


def check(**values: tuple[Any, Any]) -> dict[str, Any]:
    """``valid`` for several parameters, each with its value and kind; what is wrong with any is said at once.

    >>> check(epochs=(3, Count))
    {'epochs': 3}
    """
    kinds = tuple((name, kind) for name, (_, kind) in values.items())
    return dict(_call(kinds)(**{name: value for name, (value, _) in values.items()}))


@cache  # the loss checks its numbers in every micro-batch
def _call(kinds: tuple[tuple[str, Any], ...]) -> type[BaseModel]:
    fields: dict[str, Any] = {name: (kind, ...) for name, kind in kinds}
    return create_model("Call", __base__=Checked, **fields)


class Checked(BaseModel):
    """Named values that cannot be changed; each has a type and a range.

    Raises:
        ValueError: an unknown name, a value of another type (True is no number, "3" neither), out of range or not
            finite; names it and gives the value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as e:
            raise ValueError("; ".join(problem(item, type(self).model_fields) for item in e.errors())) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False):
        """The same with other values, checked anew (pydantic's own would take anything)."""
        return type(self)(**self.model_dump() | dict(update or {}))


class Limits(Checked, use_attribute_docstrings=True):
    """What a rollout may spend."""

    max_turns: Whole = 4
    """turns in which a search is carried out; after the last one the model may still write once more, to answer. A
    turn without a valid action counts"""
    max_turn_tokens: Count = 500
    """tokens that the model may sample in one turn; one rambling rollout holds up its whole batch"""
    max_observation_tokens: Count = 500
    """tokens of one observation; documents are shortened, tags never"""
    max_completion_length: Count = 2048
    """tokens of the whole completion, observations included"""
    topk: Count = 3
    """documents that a search returns"""
    search_timeout: Seconds | None = 60.0
    """seconds to wait for the engine's answer to one batch, and once more in all where it fails and is asked one by
    one; None: for ever"""

    def limits(self) -> dict[str, Any]:
        """The part that ``rollout`` takes."""
        return {name: getattr(self, name) for name in Limits.model_fields}
