"""Trajectories written by hand, to try a reward on before a model is trained on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..environment import protocol
from ..records import Hit, Passage, Question, SearchCall, Segment, Trajectory


def handwritten(
    question: Question,
    turns: Sequence[str | tuple[str, Sequence[Passage]]],
    *,
    probability: float = 0.9,
    group: str = "",
) -> Trajectory:
    """The trajectory that a rollout would make of these turns; one token per character.

    Args:
        turns: what the model writes, turn by turn. A turn is cut after its first action. A pair
            ``(text, passages)`` is a turn whose search returned those passages; a search in a plain turn
            was not executed.
        probability: with which each of the model's tokens was sampled.

    >>> t = handwritten(Question("q", "Who?", ["Ada"]), ["<think> Ada </think><answer> Ada </answer>"])
    >>> t.answer, t.finish_reason
    ('Ada', 'answer')
    """
    t = Trajectory(question, [], [], [], [], finish_reason="turns", group=group)
    for number, turn in enumerate(turns):
        text, passages = (turn, None) if isinstance(turn, str) else turn
        end, stop = protocol.find_stop(text)
        text = text if stop is None else text[:end]
        action = protocol.read_action(text)
        for kind, start, stop_at in protocol.split_turn(text):
            # a forged observation is the model's own text, and is kept as such
            _append(t, "text" if kind == "information" else kind, text[start:stop_at], number, math.log(probability))
        if action.kind == "answer":
            t.answer, t.finish_reason = action.text, "answer"
        elif action.kind == "search" and passages is not None:
            hits = [Hit(p, 1.0 / rank) for rank, p in enumerate(passages, 1)]
            t.searches.append(SearchCall(action.text, hits, 0.0))
            _append(t, "information", protocol.observation(passages), number, None)
        elif action.kind is None:
            t.invalid_turns += 1
            if number + 1 < len(turns):
                _append(t, "invalid", protocol.INVALID_ACTION, number, None)
    t.turns = len(turns)
    return t


def _append(t: Trajectory, kind: str, text: str, turn: int, logprob: float | None) -> None:
    start, n = len(t.completion_ids), len(text)
    t.completion_ids += map(ord, text)
    t.tokens += text
    t.mask += [int(logprob is not None)] * n
    t.logprobs += [logprob or 0.0] * n
    t.segments.append(Segment(kind, text, turn, start, start + n))
