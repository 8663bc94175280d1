"""Trajectories written by hand, to try a reward on before a model is trained on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..environment import protocol
from ..environment.base import Done, Limits, Observation, Request
from ..environment.search import Search, SearchEnvironment
from ..records import ENVIRONMENT, Hit, Passage, Question, Segment, ToolCall, Trajectory


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
    limits = Limits(max_turns=len(turns), max_observation_tokens=10**6)
    environment = SearchEnvironment([Search(None)], limits)
    t = Trajectory(question, [], [], [], [], finish_reason="turns", group=group)
    for number, turn in enumerate(turns):
        text, passages = (turn, None) if isinstance(turn, str) else turn
        end, stop = protocol.find_stop(text, environment.stops)
        text = text if stop is None else text[:end]
        for kind, start, stop_at in environment.parts(text):
            _append(t, "policy", kind, text[start:stop_at], number, probability)
        outcome = environment.act(text)
        if isinstance(outcome, Done):
            t.answer, t.finish_reason = outcome.answer, outcome.reason
        elif isinstance(outcome, Request) and passages is not None:
            hits = [Hit(p, 1.0 / rank) for rank, p in enumerate(passages, 1)]
            t.calls.append(ToolCall(outcome.tool.name, outcome.argument, hits))
            _append(t, ENVIRONMENT, "information", environment.observe(t.calls[-1]).text, number)
        elif isinstance(outcome, Observation) and number + 1 < len(turns):
            _append(t, ENVIRONMENT, outcome.kind, outcome.text, number)
    t.turns, t.invalid_turns = len(turns), environment.invalid_turns
    return t


def _append(t: Trajectory, author: str, kind: str, text: str, turn: int, probability: float | None = None) -> None:
    start, n = len(t.completion_ids), len(text)
    t.completion_ids += map(ord, text)
    t.tokens += text
    t.ends += range(start + 1, start + n + 1)
    t.mask += [int(probability is not None)] * n
    t.logprobs += [math.log(probability) if probability else 0.0] * n
    t.segments.append(Segment(author, kind, text, turn, start, start + n))
