"""Process rewards: the form of a trajectory, and whether its searches found anything.

Form is judged by a state machine over the segments, so a tag inside a passage is never read as a tag.
"""

from __future__ import annotations

from ..environment.protocol import TAGS
from ..metrics import answer_retrieved, malformed, passages_read
from ..records import Segment, Trajectory
from .base import Reward, answer_flags

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
