"""What flows through the project: questions, passages, hits and trajectories.

A ``Trajectory`` is made once, by the rollout, and only gains fields afterwards (reward, advantage).
Importing this loads no numeric library: a record is plain Python and has one JSON form (``study.tables`` makes a
table of it, whose columns follow from the fields' types).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

_QUOTED = r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\""""


def texts(name: str, value: Any) -> list[str]:
    """The texts of a field: a single one is a list of one, and a list that was stored as text, in JSON or as Python or
    numpy print it, is that list.

    >>> texts("answers", "Paris"), texts("answers", '["a", "b"]'), texts("answers", "['a' 'b']")
    (['Paris'], ['a', 'b'], ['a', 'b'])

    Raises:
        ValueError: something is no text; names the field.
    """
    if isinstance(value, str):
        if re.fullmatch(rf"\[\s*(?:(?:{_QUOTED})[\s,]*)*\]", value.strip()):
            for read in (json.loads, lambda text: [ast.literal_eval(part) for part in re.findall(_QUOTED, text)]):
                with suppress(ValueError, SyntaxError):
                    return read(value)
        return [value]
    items: list[Any] = [value] if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable) else list(value)
    if wrong := [item for item in items if not isinstance(item, str)]:
        raise ValueError(f"field '{name}': expected text, found {type(wrong[0]).__name__}")
    return items


@dataclass(frozen=True)
class Passage:
    """A piece of text that a search can return."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Hit:
    """A passage that a search returned, with the engine's score (higher is better)."""

    passage: Passage
    score: float


@dataclass(frozen=True)
class Note:
    """A passage that is remembered.

    Attributes:
        query: what was asked when it was found.
        source: who found it, a tool or the policy.
        time: when, in a training the step; below 0: before it.
    """

    passage: Passage
    query: str = ""
    source: str = ""
    time: int = -1


@dataclass
class Question:
    """A question with its accepted answers.

    Attributes:
        answers: given as ``texts`` reads them: a single text is one answer, not its letters.
        passages: ids of the gold passages, in the order of the hops.
        hops: how many searches are needed by a model that knows nothing of it.
        known: True if the policy can answer without searching, False if facts are missing that stand only in passages,
            None where nobody can say (real questions). On the almanac True means that answering at once is best: sure
            memories at every hop, be they true or not; see ``worlds.almanac.PRICE``.
        source: where it comes from. Of the almanac also its kind and, hop by hop, the level of what is recalled:
            "almanac/2-hop/30".

    Raises:
        ValueError: an answer or the id of a passage is no text.
    """

    id: str
    text: str
    answers: list[str]
    passages: list[str] = field(default_factory=list)
    hops: int = 1
    known: bool | None = None
    source: str = ""

    def __init__(self, id, text, answers, *, passages=(), hops=1, known=None, source=""):
        self.id, self.text, self.answers = str(id), text, texts("answers", answers)
        self.passages, self.hops, self.known, self.source = texts("passages", passages), hops, known, source


@dataclass
class ToolCall:
    """One use of a tool in a trajectory.

    Attributes:
        tool: its name, "search" for a search.
        argument: what it was asked: the query of a search.
        result: what it gave, best first. What is no passage by nature (a number) is the text of one.
        error: why there is no result, None if the tool answered.
        inner: where another agent was asked, its rollout.
    """

    tool: str
    argument: str
    result: list[Hit]
    seconds: float = 0.0
    error: str | None = None
    inner: Trajectory | None = None


def SearchCall(query: str, hits: list[Hit], seconds: float = 0.0, error: str | None = None) -> ToolCall:
    """A call of the tool "search"."""
    return ToolCall("search", query, hits, seconds, error)


#: The author of what no policy wrote: observations, and messages about a turn without an action.
ENVIRONMENT = "environment"


@dataclass
class Segment:
    """A part of a completion, in order and without gaps.

    Attributes:
        author: who wrote it: "environment", or one of a policy's authors (see ``Policy.authors``). Where two wrote, the
            one that wrote its end: a search is by who wrote the query, whoever decided for it.
        kind: "think", "answer", the name of a tool such as "search", "text" (a policy's, outside any tag);
            "information" (an observation) or "invalid" (a message that a turn held no action).
        text: the exact text, tags included.
        turn: number of the turn, from 0.
        start, end: the tokens ``completion_ids[start:end]`` in which the text stands. Tokens can
            straddle two segments; both then count it.
    """

    author: str
    kind: str
    text: str
    turn: int
    start: int
    end: int

    @property
    def by_model(self) -> bool:
        """False for text of the environment, whatever it looks like."""
        return self.author != ENVIRONMENT


FINISH_REASONS = ("answer", "turns", "length", "stop")


@dataclass
class Trajectory:
    """One rollout: what was asked, what the model wrote, what the environment wrote, what it earned.

    Attributes:
        prompt_ids: token ids of the prompt, chat template included.
        completion_ids, mask, logprobs: equal length T. ``mask`` is 1 where the model sampled the
            token and 0 for environment text; ``logprobs`` are taken under the sampling distribution
            (temperature applied), 0.0 where the mask is 0.
        authors: who wrote each completion token, (T,), where the policy has several authors; empty where it has one.
            "environment" for an observation, and the first author for a tag that was put into its mouth.
        tokens: the text of each completion token, for display ("\\ufffd" for a part of a character).
        ends: where each token ends in ``text``, (T,): token i is ``text[ends[i - 1]:ends[i]]``. A special token is
            empty; of tokens that share a character the last one has it.
        segments: the completion cut by author and kind, see ``Segment``.
        calls: one for each use of a tool, in order; ``searches`` are those of the tool "search".
        answer: the text of the ``<answer>`` action, None if the rollout ended without one.
        finish_reason: "answer", "turns" (no turn left), "length" (token budget spent) or "stop"
            (the model ended its message without an answer).
        reward: the scalar that training used; ``rewards`` its parts by name.
        turn_rewards: the reward by turn (they sum to it), in the order of ``Segment.turn``.
        advantages: one for each token, (T,), whatever its author; empty before the learner has seen it.
        group: rollouts of one question in one step share it.
        invalid_turns: turns without a valid action, a last one that just stops included.
        first_action: the act whose tag was put into the model's mouth in its first turn, e.g. "search".
        forced: the token of that tag that decides for the act; the tag's other tokens are spelling.
        tree: which tree of its group it grew on; None where every rollout begins at the prompt.
        shared: so many of its first completion tokens were sampled for another rollout, off which it branches.
        token_values: further values per token by name, e.g. "entropy" (nats), each of length T.
    """

    question: Question
    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]
    logprobs: list[float]
    segments: list[Segment] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    answer: str | None = None
    finish_reason: str = "stop"
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    turn_rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    group: str = ""
    prompt: str = ""
    authors: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    turns: int = 0
    invalid_turns: int = 0
    first_action: str | None = None
    forced: int | None = None
    tree: int | None = None
    shared: int = 0
    step: int | None = None
    seconds: float = 0.0
    token_values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole completion, environment text included."""
        return "".join(s.text for s in self.segments)

    @property
    def searches(self) -> list[ToolCall]:
        """The calls of the tool "search"."""
        return [call for call in self.calls if call.tool == "search"]

    @property
    def colleagues(self) -> list[Trajectory]:
        """The rollouts of the agents that it asked, and of those that they asked."""
        asked = [call.inner for call in self.calls if call.inner]
        return [t for inner in asked for t in (inner, *inner.colleagues)]

    @property
    def advantage(self) -> float | None:
        """The mean advantage of the sampled tokens; None before there is any."""
        sampled = [a for a, m in zip(self.advantages, self.mask) if m]
        return fmean(sampled) if sampled else None

    def mask_of(self, author: str) -> list[int]:
        """``mask``, with 0 also where another policy wrote, (T,).

        Where ``authors`` were not recorded, a token is by the author of the segment that begins last before it: the end
        of a message stands in none.
        """
        if self.authors:
            return [int(m and by == author) for m, by in zip(self.mask, self.authors)]
        if all(s.author in (author, ENVIRONMENT) for s in self.segments):
            return self.mask
        ends = [s.start for s in self.segments[1:]] + [len(self.mask)]
        by_author = [s.author == author for s, end in zip(self.segments, ends) for _ in range(s.start, end)]
        return [int(m and mine) for m, mine in zip(self.mask, by_author)]

    @property
    def model_text(self) -> str:
        """Only what the model wrote."""
        return "".join(s.text for s in self.segments if s.by_model)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: nested plain values; ``from_dict`` reads it back equal. Its lists are the trajectory's own."""
        results = [[{"passage": dict(vars(h.passage)), "score": h.score} for h in call.result] for call in self.calls]
        return vars(self) | {
            "question": dict(vars(self.question)),
            "segments": [dict(vars(s)) for s in self.segments],
            "calls": [
                vars(call) | {"result": result, "inner": call.inner and call.inner.to_dict()}
                for call, result in zip(self.calls, results)
            ],
        }

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Trajectory:
        """Read the JSON form.

        Raises:
            ValueError: a field is missing or unknown, or the per-token fields differ in length.
        """
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(row) - names):
            raise ValueError(f"unknown trajectory field(s) {', '.join(unknown)}: written by another version?")
        try:
            row = dict(row)
            row["question"] = Question(**row["question"])
            row["segments"] = [Segment(**s) for s in row.get("segments", [])]
            row["calls"] = [_call(call) for call in row.get("calls", [])]
            trajectory = cls(**row)
        except (TypeError, KeyError) as e:
            raise ValueError(f"not a trajectory: {e}") from None
        if not len(trajectory.completion_ids) == len(trajectory.mask) == len(trajectory.logprobs):
            raise ValueError("completion_ids, mask and logprobs differ in length")
        return trajectory


def _call(row: dict[str, Any]) -> ToolCall:
    inner = row.get("inner")
    result = [Hit(Passage(**h["passage"]), h["score"]) for h in row["result"]]
    return ToolCall(**row | {"result": result, "inner": inner and Trajectory.from_dict(inner)})


@dataclass(frozen=True)
class Scores:
    """What a reward says of B trajectories: a return value, of which no trajectory knows until it is ``kept``.

    Attributes:
        values: the reward of each, (B,).
        parts: the value of each part of the reward by its name, (B,) each; the whole stands there too.
        turns: for each trajectory the reward by turn; they sum to its value.
    """

    values: list[float]
    parts: dict[str, list[float]]
    turns: list[list[float]]

    def keep(self, trajectories: Sequence[Trajectory]) -> None:
        """Write the scores into the trajectories that they were made of.

        Raises:
            ValueError: one has a reward already: a trajectory only gains fields.
        """
        if scored := next((t for t in trajectories if t.reward is not None), None):
            raise ValueError(f"the trajectory of question {scored.question.id!r} has a reward already: use the values")
        for i, t in enumerate(trajectories):
            t.reward, t.turn_rewards = self.values[i], self.turns[i]
            t.rewards = {name: values[i] for name, values in self.parts.items()}
