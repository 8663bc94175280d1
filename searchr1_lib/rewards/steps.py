"""Rewards that are earned search by search: what each one found, and what it wasted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..environment.limits import Amount, valid
from ..metrics import holds_answer
from ..records import Trajectory
from .base import TurnReward, turn_count
from .composite import Composite, SearchR1Reward
from .process import Format, query_of


def search_turns(trajectory: Trajectory, tools: Sequence[str] = ("search",)) -> list[int]:
    """The turn in which each executed search (or call of these tools) was asked: the one before each observation."""
    turns, pending = [], None
    for s in trajectory.segments:
        if s.kind in tools:
            pending = s.turn
        elif s.kind == "information" and pending is not None:
            turns.append(pending)
            pending = None
    made = sum(call.tool in tools for call in trajectory.calls)
    missing = made - len(turns)
    return turns[:made] + [turn_count(trajectory) - 1] * max(0, missing)


class InformationGain(TurnReward):
    """Per search: the share of the gold passages that it found first, minus ``redundancy`` times the share of
    its hits that earlier searches had already returned.

    For search t with the hits ``H_t``, the gold passages ``P`` and everything found before ``S = H_1 + … + H_(t-1)``

        value_t = |(H_t - S) & P| / |P|  -  redundancy * |H_t & S| / |H_t|

    The idea is StepSearch's (Wang et al. 2025, arXiv 2505.15107), which pays a step for its information gain and
    fines documents retrieved again; it measures the gain by TF-IDF overlap with the gold documents, we by identity.
    A question without gold passages has one thing to find: a passage that holds a gold answer.

    Raises:
        ValueError: a redundancy that is negative or not finite.
    """

    name = "information_gain"

    def __init__(self, redundancy: float = 0.0):
        self.redundancy = valid(Amount, redundancy, "InformationGain: redundancy")

    def turn_values(self, trajectory: Trajectory) -> list[float]:
        values = [0.0] * turn_count(trajectory)
        gold = set(trajectory.question.passages)
        gained: set[str] = set()
        seen: set[str] = set()
        for turn, search in zip(search_turns(trajectory), trajectory.searches):
            ids = {hit.passage.id for hit in search.result}
            useful = ids & gold
            if not gold and any(holds_answer(hit.passage, trajectory.question) for hit in search.result):
                useful = {"answer"}
            values[turn] += len(useful - gained) / max(1, len(gold))
            values[turn] -= self.redundancy * len(ids & seen) / max(1, len(ids))
            gained |= useful
            seen |= ids
        return values


class HierarchicalReward(Composite):
    """A reward on three levels: one for the whole, one for each hop found, one for form, each with its weight.

    ``whole * search_r1 + hops * information_gain + form * format``: the default reward with its ``cost`` of a search,
    the share of the gold passages that each search found first (in its turn, so that credit by turn can use it; 1 for
    all of them), and 1 for a well-formed rollout. Unlike potential-based shaping (``credit="potential"``) it changes
    what is best: where ``hops`` is more than all the searches cost, looking up what one knows is worth its price.

    Raises:
        ValueError: a weight that is not a finite number, or a cost below 0.
    """

    def __init__(self, cost: float = 0.15, whole: float = 1.0, hops: float = 0.3, form: float = 0.1):
        parts = (whole, SearchR1Reward(cost)), (hops, InformationGain()), (form, Format())
        super().__init__(parts, name="hierarchical")


class RepeatedSearch(TurnReward):
    """``-penalty`` for every search that is empty or repeats the words of an earlier one in the same order.

    Raises:
        ValueError: a penalty that is negative or not finite.
    """

    name = "repeated_search"

    def __init__(self, penalty: float = 0.1):
        self.penalty = valid(Amount, penalty, "RepeatedSearch: penalty")

    def turn_values(self, trajectory: Trajectory) -> list[float]:
        values, seen = [0.0] * turn_count(trajectory), {""}
        for s in trajectory.segments:
            if s.kind == "search":
                query = " ".join(re.findall(r"\w+", query_of(s).lower()))
                values[s.turn] -= self.penalty * (query in seen)
                seen.add(query)
        return values
