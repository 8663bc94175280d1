"""A reward from its name, as a profile, a sweep or the command line can write it."""

from __future__ import annotations

import inspect
from typing import Any

from .base import Reward, RewardFunction, TurnReward
from .composite import Composite

_TYPES: dict[str, Any] = {"float": (int, float), "int": int, "str": str}


def build(spec: Any, **defaults: Any) -> RewardFunction:
    """The reward that a specification names.

    >>> build("SearchR1Reward", cost=0.3)
    SearchR1Reward(1.0 * exact_match + 1.0 * search_cost + 1.0 * malformed)
    >>> build({"OTC": {"c": 3}})
    OTC(correctness=ExactMatch(), c=3.0, alpha=1.0)
    >>> build([[1.0, "ExactMatch"], [1.0, {"SearchCost": {"cost": 0.1}}], [1.0, "Malformed"]])
    Composite(1.0 * exact_match + 1.0 * search_cost + 1.0 * malformed)

    Args:
        spec: the name of a class in ``searchr1_lib.rewards``; {name: {argument: value}}, where an argument that is a
            reward is again such a specification; or a list of [weight, specification].
        defaults: arguments for each class that has them and to which the specification gives none.

    Raises:
        ValueError: no such class, an argument that it does not have or lacks, or a value that it refuses; names it.
    """
    if isinstance(spec, list):
        return _call(Composite, {"parts": spec}, defaults)
    name, given = next(iter(spec.items())) if isinstance(spec, dict) and len(spec) == 1 else (spec, None)
    if not isinstance(name, str) or not isinstance(given or {}, dict):
        forms = "a name, {name: {argument: value}} or [[weight, reward], ...]"
        raise ValueError(f"reward: expected {forms}, got {spec!r:.80}")
    if name not in _classes():
        raise ValueError(f"reward: {name!r} is unknown; there are {', '.join(_classes())}")
    return _call(_classes()[name], given or {}, defaults)


def _call(make: type, given: dict[str, Any], defaults: dict[str, Any]) -> Any:
    signature = inspect.signature(make)
    kinds = {name: str(parameter.annotation) for name, parameter in signature.parameters.items()}
    given = {name: value for name, value in defaults.items() if name in kinds} | given
    try:
        signature.bind(**given)
        return make(**{name: _argument(name, value, kinds.get(name, ""), defaults) for name, value in given.items()})
    except (TypeError, ValueError) as e:
        raise ValueError(f"reward: {make.__name__}: {str(e).removeprefix('reward: ')}") from None


def _argument(name: str, value: Any, kind: str, defaults: dict[str, Any]) -> Any:
    """An argument's value. Where a reward belongs, or a class of the package is named, it is built."""
    if "RewardFunction" in kind and value is not None:
        if not kind.startswith("Sequence"):
            return build(value, **defaults)
        if "tuple" not in kind:
            return [build(part, **defaults) for part in value]
        if not all(isinstance(part, list) and len(part) == 2 for part in value):
            raise ValueError(f"expected pairs [weight, reward], got {value!r:.80}")
        return [(weight, build(part, **defaults)) for weight, part in value]
    if kind in _TYPES and (isinstance(value, bool) or not isinstance(value, _TYPES[kind])):
        raise ValueError(f"{name} must be of type {kind}, got {value!r}")
    named = isinstance(value, dict) and len(value) == 1 and next(iter(value)) in _classes()
    return build(value, **defaults) if named else value


def _classes() -> dict[str, type]:
    """What a specification can name: the package's classes but for errors and bases."""
    from .. import rewards

    members = {name: getattr(rewards, name) for name in rewards.__all__}
    unfit = (Reward, TurnReward)
    return {n: m for n, m in members.items() if isinstance(m, type) and m not in unfit and not issubclass(m, Exception)}
