"""Process rewards: the form of a trajectory, what its searches found, and what they wasted.

Form is judged by a state machine over the segments, so a tag inside a passage is never read as a tag.
"""

from __future__ import annotations

import re

from ..environment.protocol import TAGS
from ..metrics import answer_retrieved, exact_match, holds_answer, malformed, passages_read
from ..records import Segment, Trajectory
from .base import Reward, TurnReward, answer_flags, final_answer, turn_count

#: state -> {kind of segment: next state}; a trajectory is well-formed if it gets from "turn" to "end". A "search" is
#: the use of any tool.
FORMAT_STATES = {
    "turn": {"think": "thought"},
    "thought": {"search": "query", "answer": "end"},
    "query": {"information": "turn"},
    "end": {},
}


def format_errors(trajectory: Trajectory) -> list[str]:
    """What breaks the form ``think (search information think)* answer``; empty for a well-formed trajectory.

    White space between the parts is free. A search that was never executed leaves the trajectory without
    an end, so it is an error (the public format check accepts it).
    """
    if not trajectory.segments:
        return ["empty completion"]
    state, errors = "turn", []
    for s in trajectory.segments:
        if s.kind == "text" and not s.text.strip():
            continue
        is_tool = s.by_model and s.kind not in ("think", "answer", "text")
        if is_tool and not query_of(s):
            errors.append(f"empty {s.kind} in turn {s.turn}")
        if (is_tool or s.kind in ("think", "answer")) and s.text.count("<") != 2:
            errors += _nested(s)
        if (after := FORMAT_STATES[state].get("search" if is_tool else s.kind)) is None:
            return errors + [f"{s.kind} in turn {s.turn}, expected {' or '.join(FORMAT_STATES[state]) or 'the end'}"]
        state = after
    if state != "end":
        errors.append(f"ends without an answer ({trajectory.finish_reason})")
    return errors + [f"answers: {flag}" for flag in answer_flags(trajectory)]


def _nested(segment: Segment) -> list[str]:
    tags = sum(segment.text.count(f"<{slash}{kind}>") for slash in ("", "/") for kind in {*TAGS, segment.kind})
    return [] if tags == 2 else [f"unclosed or nested tags in the {segment.kind} of turn {segment.turn}"]


def query_of(segment: Segment) -> str:
    """The argument of a tool's segment, such as the query of a search, stripped."""
    return segment.text.removeprefix(f"<{segment.kind}>").removesuffix(f"</{segment.kind}>").strip()


class Format(Reward):
    """1.0 for a well-formed trajectory, else 0.0 (see ``format_errors``).

    Alone it is easily won without answering anything right: use it as a small part, or ``SearchR1Format``.
    """

    name = "format"

    def value(self, trajectory: Trajectory) -> float:
        return float(not format_errors(trajectory))


class SearchR1Format(Reward):
    """The format-aware exact match of Search-R1's scripts (Jin et al. 2025, arXiv 2503.09516 and its code).

    Well-formed and correct 1.0; correct only ``1 - structure``; well-formed only ``structure``, plus
    ``retrieval`` if a gold answer stands in what was retrieved; neither, but an answer was given,
    ``answered``; otherwise 0. The defaults are those of its scripts, which leave the retrieval part at 0.
    """

    name = "search_r1_format"

    def __init__(self, structure: float = 0.2, retrieval: float = 0.0, answered: float = 0.1):
        self.structure, self.retrieval, self.answered = structure, retrieval, answered

    def value(self, trajectory: Trajectory) -> float:
        answer = final_answer(trajectory)
        formed = not format_errors(trajectory)
        if exact_match(answer, trajectory.question.answers):
            return 1.0 if formed else 1.0 - self.structure
        if formed:
            return self.structure + self.retrieval * answer_retrieved(trajectory)
        return self.answered if answer is not None else 0.0


class Malformed(Reward):
    """-1.0 for a trajectory with a malformed turn (one without a valid action), else 0.0.

    After such a turn the environment says what was wrong, and the model goes on, unless it ended its message. Were that
    free, then a policy that has begun a wrong ``<answer`` would earn more by spoiling the tag than by finishing it. And
    were it merely worth nothing, then no force would keep the tags of wrong answers in shape: all of them are pushed
    down alike.
    """

    name = "malformed"

    def value(self, trajectory: Trajectory) -> float:
        return -1.0 if malformed(trajectory) else 0.0


class Retrieval(Reward):
    """1.0 if the searches found a gold passage (by id) or a passage that holds a gold answer, else 0.0.

    Without a cost it is won by searching for everything; pair it with ``SearchCost``.
    """

    name = "retrieval"

    def value(self, trajectory: Trajectory) -> float:
        gold = set(trajectory.question.passages)
        gold_read = any(passage.id in gold for passage in passages_read(trajectory))
        return float(gold_read or answer_retrieved(trajectory))


def search_turns(trajectory: Trajectory) -> list[int]:
    """The turn in which each executed search was asked: the model's search before each observation."""
    turns, pending = [], None
    for s in trajectory.segments:
        if s.kind == "search":
            pending = s.turn
        elif s.kind == "information" and pending is not None:
            turns.append(pending)
            pending = None
    missing = len(trajectory.searches) - len(turns)
    return turns[: len(trajectory.searches)] + [turn_count(trajectory) - 1] * max(0, missing)


class InformationGain(TurnReward):
    """Per search: the share of the gold passages that it found first, minus ``redundancy`` times the share of
    its hits that earlier searches had already returned.

    For search t with the hits ``H_t``, the gold passages ``P`` and everything found before ``S = H_1 + … + H_(t-1)``

        value_t = |(H_t - S) & P| / |P|  -  redundancy * |H_t & S| / |H_t|

    The idea is StepSearch's (Wang et al. 2025, arXiv 2505.15107), which pays a step for its information gain and
    fines documents retrieved again; it measures the gain by TF-IDF overlap with the gold documents, we by identity.
    A question without gold passages has one thing to find: a passage that holds a gold answer.
    """

    name = "information_gain"

    def __init__(self, redundancy: float = 0.0):
        self.redundancy = redundancy

    def turn_values(self, trajectory: Trajectory) -> list[float]:
        values = [0.0] * turn_count(trajectory)
        gold = set(trajectory.question.passages)
        gained, seen = set(), set()
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


class RepeatedSearch(TurnReward):
    """``-penalty`` for every search that is empty or repeats the words of an earlier one in the same order.

    Raises:
        ValueError: a negative penalty.
    """

    name = "repeated_search"

    def __init__(self, penalty: float = 0.1):
        if not penalty >= 0:
            raise ValueError(f"RepeatedSearch: penalty must be 0 or more, not {penalty}")
        self.penalty = penalty

    def turn_values(self, trajectory: Trajectory) -> list[float]:
        values, seen = [0.0] * turn_count(trajectory), {""}
        for s in trajectory.segments:
            if s.kind == "search":
                query = " ".join(re.findall(r"\w+", query_of(s).lower()))
                values[s.turn] -= self.penalty * (query in seen)
                seen.add(query)
        return values
