"""Putting rewards together: weighted sums, products, thresholds, normalisation; the project's default reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..records import Trajectory
from .answer import ExactMatch
from .base import RewardFunction, by_group, checked, name_of, spread, turn_count
from .cost import SearchCost
from .process import Malformed


class Composite:
    """A weighted sum of rewards; each part is kept, unweighted, in ``trajectory.rewards`` under its name.

    >>> Composite([(0.7, ExactMatch()), (1.0, SearchCost(0.1))])
    Composite(0.7 * exact_match + 1.0 * search_cost)

    Raises:
        ValueError: no part, a weight that is not a finite number, or two parts of one name.
    """

    def __init__(self, parts: Sequence[tuple[float, RewardFunction]], name: str = "composite"):
        self.parts, self.name = [(float(w), r) for w, r in parts], name
        if not self.parts:
            raise ValueError("Composite needs at least one (weight, reward) pair")
        if bad := [name_of(r) for w, r in self.parts if not math.isfinite(w)]:
            raise ValueError(f"Composite: the weight of {bad[0]!r} is not a finite number")
        _unique(self)

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory, ``sum(weight * part)``. Raises RewardError, see ``checked``."""
        columns = _columns([r for _, r in self.parts], trajectories)
        return [math.fsum(w * v for (w, _), v in zip(self.parts, row)) for row in zip(*columns)]

    def per_turn(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """The sum by turn, of trajectories that this composite has just scored (see ``score``)."""
        total = [[0.0] * turn_count(t) for t in trajectories]
        for w, r in self.parts:
            turns = spread(r, trajectories, [t.rewards[name_of(r)] for t in trajectories])
            total = [[a + w * b for a, b in zip(row, new)] for row, new in zip(total, turns)]
        return total

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' + '.join(f'{w} * {name_of(r)}' for w, r in self.parts)})"


class SearchR1Reward(Composite):
    """The project's default: exact match, minus ``cost`` for every search of a right answer, and 1 for malformed turns.

    Exact match alone is the outcome reward of Search-R1 (Jin et al. 2025, arXiv 2503.09516). The cost makes
    the choice matter: a question whose answer the model knows is worth more without a search, one that
    it must look up is worth ``1 - cost * hops``. A wrong answer earns 0, whatever was searched: were it charged
    for its searches, then on a question that no rollout gets right the best ones of the group would be those that
    gave up without a search, and division by the group's small standard deviation would make that lesson as loud
    as any other. (OTC, arXiv 2504.14870, multiplies for the same end. ``Composite([(1, ExactMatch()),
    (1, SearchCost(cost))])`` charges every search.) What malformed turns cost is no choice: see ``Malformed``.
    """

    def __init__(self, cost: float = 0.15):
        correct = ExactMatch()
        parts = correct, SearchCost(cost, only_if=correct), Malformed()
        super().__init__([(1.0, part) for part in parts], name="search_r1")


class Product:
    """The product of rewards, each kept in ``trajectory.rewards``: nothing is earned where one part is 0."""

    def __init__(self, parts: Sequence[RewardFunction], name: str = "product"):
        self.parts, self.name = [(1.0, r) for r in parts], name
        if not self.parts:
            raise ValueError("Product needs at least one reward")
        _unique(self)

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory. Raises RewardError, see ``checked``."""
        return [math.prod(row) for row in zip(*_columns([r for _, r in self.parts], trajectories))]


class Threshold:
    """1.0 where a reward is at least ``at``, else 0.0."""

    def __init__(self, reward: RewardFunction, at: float, name: str = ""):
        self.parts, self.at, self.name = [(1.0, reward)], at, name or f"{name_of(reward)}>={at:g}"

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        (values,) = _columns([self.parts[0][1]], trajectories)
        return [float(v >= self.at) for v in values]


class Scaled:
    """A reward mapped from [low, high] to [0, 1], and cut there.

    Raises:
        ValueError: ``low`` is not below ``high``.
    """

    def __init__(self, reward: RewardFunction, low: float, high: float, name: str = ""):
        if not low < high:
            raise ValueError(f"Scaled: low ({low}) must be below high ({high})")
        self.parts, self.low, self.high = [(1.0, reward)], low, high
        self.name = name or f"{name_of(reward)}_scaled"

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        (values,) = _columns([self.parts[0][1]], trajectories)
        return [min(1.0, max(0.0, (v - self.low) / (self.high - self.low))) for v in values]


class Standardized:
    """A reward with mean 0 and standard deviation 1 within each group (0 where all are equal).

    Normalising each part before summing keeps a part of small spread from being drowned by another
    (decoupled normalisation, Liu et al. 2026, "GDPO", arXiv 2601.05242). The population deviation is used.
    """

    def __init__(self, reward: RewardFunction, name: str = ""):
        self.parts, self.name = [(1.0, reward)], name or f"{name_of(reward)}_standardized"

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        (values,) = _columns([self.parts[0][1]], trajectories)
        out = [0.0] * len(values)
        for places in by_group(trajectories).values():
            mean = math.fsum(values[i] for i in places) / len(places)
            std = math.sqrt(math.fsum((values[i] - mean) ** 2 for i in places) / len(places))
            for i in places:
                out[i] = (values[i] - mean) / std if std > 1e-9 else 0.0
        return out


def _columns(rewards: list[RewardFunction], trajectories: Sequence[Trajectory]) -> list[list[float]]:
    """The values of each reward; written into ``trajectory.rewards`` once all of them succeeded."""
    columns = [checked(r, trajectories) for r in rewards]
    for r, values in zip(rewards, columns):
        for t, value in zip(trajectories, values):
            t.rewards[name_of(r)] = value
    return columns


def _names(reward) -> list[str]:
    """The reward's name and those of all its parts."""
    return [name_of(reward)] + [n for _, r in getattr(reward, "parts", ()) for n in _names(r)]


def _unique(reward) -> None:
    names = _names(reward)
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"{type(reward).__name__}: two rewards are named {twice[0]!r}; give one another name")
