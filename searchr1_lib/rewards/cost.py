"""What a rollout costs, in searches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import zip_longest
from types import MappingProxyType

from ..environment.limits import Amount, Share, check, valid
from ..metrics import normalize_answer, right
from ..records import Trajectory
from .base import Reward, RewardFunction, TurnReward, checked, turn_count


def searches_by_turn(trajectory: Trajectory) -> list[int]:
    """Searches that the model asked for, by turn: executed, failed, refused (the last turn) and empty ones.

    Counted in the model's own segments, so that a search tag inside a passage is not one. Executed searches
    that no segment shows (a trajectory without segments) are put into the last turn. One that another agent answered
    counts as those that this agent made.
    """
    counts = [0] * turn_count(trajectory)
    turns = [s.turn for s in trajectory.segments if s.by_model and s.kind == "search"]
    for turn, call in zip_longest(turns, trajectory.searches):
        inner = call.inner if call else None
        counts[-1 if turn is None else turn] += sum(searches_by_turn(inner)) if inner else 1
    return counts


class SearchCost(TurnReward):
    """``-cost`` for every search that the model asked for, executed or not.

    An attempt costs what a search costs: otherwise asking past the last allowed turn, or with an engine
    that is down, would be free.

    Args:
        cost: of one search.
        only_if: a reward; where it gives nothing, searches are free (see ``SearchR1Reward`` for the reason).

    Raises:
        ValueError: a cost that is not from 0 to 1, the worth of a right answer.
    """

    name = "search_cost"

    def __init__(self, cost: float = 0.15, only_if: RewardFunction | None = None):
        self.cost, self.only_if = valid(Amount, cost, "SearchCost: cost"), only_if

    def turn_values(self, trajectory: Trajectory) -> list[float]:
        free = self.only_if is not None and not checked(self.only_if, [trajectory])[0] > 0
        return [0.0 if free else 0.0 - self.cost * n for n in searches_by_turn(trajectory)]


class Discounted(Reward):
    """A right answer after n searches earns ``(1 - price) ** n``, "unknown" earns ``unknown``, all else nothing.

    Each call of another tool that has a price takes its share likewise.

    So no right answer earns less than a wrong one, and every search takes the same share of what is left: where a
    search finds and is read with chance q, searching for a hop pays if and only if the memory of it is true with less
    than q (1 - price) (``worlds.optimum``). Searches that were refused count as well.

    Args:
        price: c, of one search.
        unknown: what saying that one does not know earns.
        tools: by name the prices of further tools, such as {"recall": 0.02}.

    Raises:
        ValueError: a price or a pay that is not from 0 to 1.
    """

    name = "discounted"

    def __init__(self, price: float = 0.3, unknown: float = 0.1, tools: Mapping[str, float] = MappingProxyType({})):
        how = {"Discounted: price": (price, Share), "Discounted: unknown": (unknown, Share)}
        self.price, self.unknown = check(**how).values()
        prices = check(**{f"Discounted: price of {name}": (one, Share) for name, one in tools.items()})
        self._left = {name: 1 - one for name, one in zip(tools, prices.values())}
        if tools:  # without any a run is made of what it was made of before there were prices
            self.tools = dict(tools)

    def value(self, trajectory: Trajectory) -> float:
        if normalize_answer(trajectory.answer or "") == "unknown":
            return self.unknown
        others = math.prod(self._left.get(call.tool, 1.0) for call in trajectory.calls)
        return right(trajectory) * (1 - self.price) ** sum(searches_by_turn(trajectory)) * others
