"""Putting rewards together: the weighted sum, and the project's default reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..environment.limits import valid
from ..records import Scores, Trajectory
from .answer import ExactMatch
from .base import Reward, RewardFunction, in_last_turn, name_of, score, turn_count
from .cost import SearchCost
from .process import Malformed


class Combined(Reward):
    """Rewards put together: a subclass says in ``combine`` what their values, a column a part, amount to.

    Raises:
        ValueError: no part, a weight that is not a finite number, or two rewards of one name, whose values could not be
            told apart.
    """

    def __init__(self, parts: Sequence[tuple[float, RewardFunction]], name: str):
        kind, self.name = type(self).__name__, name
        self.parts = [(valid(float, w, f"{kind}: the weight of {name_of(r)!r}"), r) for w, r in parts]
        if not self.parts:
            raise ValueError(f"{kind} needs at least one reward")
        names = _names(self)
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"{kind}: two rewards are named {twice[0]!r}; give one another name")

    def combine(self, columns: list[list[float]], trajectories: Sequence[Trajectory]) -> list[float]:
        raise NotImplementedError

    def scores(self, trajectories: Sequence[Trajectory]) -> Scores:
        """Values, parts and turns, see ``base.score``; each part stands there unweighted, under its name."""
        each = [score(reward, trajectories) for _, reward in self.parts]
        values = self.combine([part.values for part in each], trajectories)
        named = {name: column for part in each for name, column in part.parts.items()}
        return Scores(values, {**named, self.name: values}, self.turns(each, trajectories, values))

    def turns(self, each: list[Scores], trajectories, values) -> list[list[float]]:
        """A combination that is no sum belongs to no turn but the last."""
        return in_last_turn(trajectories, values)

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One float per trajectory. Raises RewardError, see ``base.checked``."""
        return self.scores(trajectories).values


class Composite(Combined):
    """A weighted sum of rewards.

    >>> Composite([(0.7, ExactMatch()), (1.0, SearchCost(0.1))])
    Composite(0.7 * exact_match + 1.0 * search_cost)
    """

    def __init__(self, parts: Sequence[tuple[float, RewardFunction]], name: str = "composite"):
        super().__init__(parts, name)

    def combine(self, columns, trajectories):
        return [math.fsum(w * v for (w, _), v in zip(self.parts, row)) for row in zip(*columns)]

    def turns(self, each, trajectories, values):
        total = [[0.0] * turn_count(t) for t in trajectories]
        for (w, _), part in zip(self.parts, each):
            total = [[a + w * b for a, b in zip(row, new)] for row, new in zip(total, part.turns)]
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


def _names(reward) -> list[str]:
    """The reward's name and those of all its parts."""
    return [name_of(reward)] + [n for _, r in getattr(reward, "parts", ()) for n in _names(r)]
